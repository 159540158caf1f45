"""Config: presets and their sizes, validation by message, dict and string forms, tensor names and shapes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gendistiller_ext
from gendistiller_ext.config import BASE_CONV_LAYERS, Config
from gendistiller_ext.conv_layers import parse_conv_feature_layers

# Gao et al. (arXiv 2406.09444), the rows of Tables 3 to 5; WavLM Base without its mask embedding of 768.
PARAMETERS = {
    "gendistiller": 17_589_908, "gendistiller_plain": 17_584_512, "table3_feat_2layers": 23_497_128,
    "table3_3layers": 30_585_532, "table3_1layer": 16_408_724, "table3_cross_attention": 18_772_628,
    "table3_skip": 16_408_724, "table3_output": 17_589_908, "table4_ffn2048": 16_016_020,
    "table4_ffn1536": 15_229_076, "table4_conv256": 14_243_988, "table5_12": 17_589_908,
    "table5_4_12": 17_589_908,
    "table5_4_8_12": 17_589_908, "table5_4_6_8_12": 17_589_908, "distilhubert": 27_034_752,
    "distilwavlm": 27_034_752, "wavlm_base": 94_381_168, "wavlm_base_plus": 94_381_168,
}
# name: (architecture, targets, encoder_layers)
STUDENTS = {
    "gendistiller": ("generative", (4, 8), 1), "gendistiller_plain": ("generative", (4, 8), 1),
    "table3_feat_2layers": ("self_hidden", (4, 8, 12), 2), "table3_3layers": ("self_hidden", (4, 8, 12), 3),
    "table3_1layer": ("generative", (4, 8, 12), 1), "table3_cross_attention": ("generative", (4, 8, 12), 1),
    "table3_skip": ("generative", (4, 8, 12), 1), "table3_output": ("generative", (4, 8, 12), 1),
    "table4_ffn2048": ("generative", (4, 8), 1), "table4_ffn1536": ("generative", (4, 8), 1),
    "table4_conv256": ("generative", (4, 8), 1), "table5_12": ("generative", (12,), 1),
    "table5_4_12": ("generative", (4, 12), 1), "table5_4_8_12": ("generative", (4, 8, 12), 1),
    "table5_4_6_8_12": ("generative", (4, 6, 8, 12), 1), "distilhubert": ("multi_head", (4, 8, 12), 2),
    "distilwavlm": ("multi_head", (4, 8, 12), 2),
}
# torchaudio/pipelines/_wav2vec2/impl.py: extractor_mode, conv_bias, width, blocks, heads, FFN, pre-norm,
# normalize, relative position bias.
TEACHERS = {
    "wavlm_base": ("default", False, 768, 12, 12, 3072, False, False, True),
    "wavlm_base_plus": ("default", False, 768, 12, 12, 3072, False, False, True),
    "wavlm_large": ("layer_norm", False, 1024, 24, 16, 4096, True, True, True),
    "hubert_base": ("default", False, 768, 12, 12, 3072, False, False, False),
    "hubert_large": ("layer_norm", False, 1024, 24, 16, 4096, True, True, False),
    "wav2vec2_base": ("default", False, 768, 12, 12, 3072, False, False, False),
    "wav2vec2_large": ("default", False, 1024, 24, 16, 4096, False, False, False),
    "wav2vec2_large_lv60": ("layer_norm", True, 1024, 24, 16, 4096, True, True, False),
}
FIELDS = (
    "architecture extractor_mode conv_feature_layers conv_bias feature_layer_norm feature_projection encoder_layers "
    "encoder_embed_dim encoder_ffn_embed_dim encoder_attention_heads layer_norm_first conv_pos conv_pos_groups "
    "relative_position_embedding gru_rel_pos num_buckets max_distance normalize normalize_eps dropout "
    "attention_dropout activation_dropout feature_grad_mult skip_connection output_layer cross_attention position "
    "target_layers padding"
).split()
SMALL = {
    "conv_feature_layers": [[6, 10, 5], [7, 3, 2]], "encoder_embed_dim": 8, "encoder_ffn_embed_dim": 10,
    "encoder_attention_heads": 2, "conv_pos": 4, "conv_pos_groups": 2, "num_buckets": 12, "max_distance": 20,
}
ENCODER = {"architecture": "encoder", "skip_connection": False, "output_layer": False, "target_layers": ()}


def count(config: Config) -> int:
    return sum(math.prod(shape) for shape in config.parameter_shapes().values())


def test_fields_are_those_of_the_design():
    assert [field.name for field in dataclasses.fields(Config)] == FIELDS


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_a_preset(name):
    assert count(Config.preset(name)) == PARAMETERS[name]


def test_presets_are_exactly_the_tables():
    assert set(Config.presets()) == set(STUDENTS) | set(TEACHERS)
    assert Config.preset("gendistiller") == Config()


def test_the_documented_counts_are_the_presets():
    """MODEL.md has each preset in one row of a table, with the count of its parameters."""
    text = (Path(__file__).resolve().parent.parent / "MODEL.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| ?[\d, ]*\|? ?`[a-z0-9_]+` \|", line)]
    documented = {}
    for row in rows:
        name = re.search(r"`([a-z0-9_]+)`", row)[1]
        counts = re.findall(r"\| (\d{1,3}(?:,\d{3})+) \|", row)
        if counts:
            assert name not in documented and len(counts) == 1, row
            documented[name] = int(counts[0].replace(",", ""))
    assert documented == {name: count(Config.preset(name)) for name in Config.presets()}


@pytest.mark.parametrize("name", STUDENTS)
def test_student_preset(name):
    config = Config.preset(name)
    assert (config.architecture, config.target_layers, config.encoder_layers) == STUDENTS[name]
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
    assert (config.feature_grad_mult, config.padding, config.position) == (0.1, "exact", "once")
    skip = {"table3_1layer": (False, False), "table3_cross_attention": (False, False),
            "table3_skip": (True, False),
            "table3_output": (False, True)}
    if config.architecture == "generative":
        assert (config.skip_connection, config.output_layer) == skip.get(name, (True, True))
        assert config.cross_attention == (name == "table3_cross_attention")


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_preset(name):
    config = Config.preset(name)
    assert config.architecture == "encoder" and config.feature_layer_norm
    assert config.conv_feature_layers == BASE_CONV_LAYERS
    assert (config.extractor_mode, config.conv_bias, config.encoder_embed_dim, config.encoder_layers,
            config.encoder_attention_heads, config.encoder_ffn_embed_dim, config.layer_norm_first,
            config.normalize,
            config.relative_position_embedding) == TEACHERS[name]
    assert config.gru_rel_pos == config.relative_position_embedding
    assert (config.num_buckets, config.max_distance) == (320, 800)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset: expected one of 'gendistiller', .*got 'gendistillar'"):
        Config.preset("gendistillar")
    with pytest.raises(TypeError, match="preset: .*got int 3"):
        Config.preset(3)


@pytest.mark.parametrize("name", [*STUDENTS, *TEACHERS])
def test_dict_round_trip_through_json(name):
    config = Config.preset(name)
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert list(values) == FIELDS
    again = Config.from_dict(values)
    assert again == config and hash(again) == hash(config)


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match="config: unknown fields 'encoder_layer', 7"):
        Config.from_dict({"encoder_layer": 3, "encoder_layers": 1, 7: 1})
    with pytest.raises(TypeError, match="config: expected a mapping of fields, got tuple of 1"):
        Config.from_dict((1,))
    assert Config.from_dict({}) == Config()


def test_config_is_frozen_and_replaced_with_checks():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5
    assert dataclasses.replace(config, target_layers=[12]).target_layers == (12,)
    with pytest.raises(ValueError, match='encoder_layers: expected 1 for architecture "generative", got 2'):
        dataclasses.replace(config, encoder_layers=2)


def test_numbers_of_other_kinds_become_plain():
    config = Config(encoder_embed_dim=np.int64(24), encoder_attention_heads=np.int32(3), conv_pos_groups=2,
                    dropout=np.float32(0.5), feature_grad_mult=1, normalize=np.bool_(True),
                    target_layers=[np.int8(2)])
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert type(config.encoder_embed_dim) is int and type(config.normalize) is bool
    assert type(config.dropout) is float and type(config.feature_grad_mult) is float


@pytest.mark.parametrize("fields, error, message", [
    ({"architecture": "decoder"}, ValueError,
     'architecture: expected one of "generative", "self_hidden", "multi_head", "encoder", got "decoder"'),
    ({"architecture": None}, TypeError, "architecture: expected str, got NoneType"),
    ({"extractor_mode": "group_norm"}, ValueError,
     'extractor_mode: expected one of "default", "layer_norm", got "group_norm"'),
    ({"position": "twice"}, ValueError, 'position: expected one of "once", "every_step", got "twice"'),
    ({"padding": "zero"}, ValueError, 'padding: expected one of "exact", "s3prl", got "zero"'),
    ({"encoder_layers": 1.0}, TypeError, "encoder_layers: expected int, got float 1.0"),
    ({"encoder_layers": True}, TypeError, "encoder_layers: expected int, got bool True"),
    ({"encoder_layers": "1"}, TypeError, "encoder_layers: expected int, got str '1'"),
    ({"encoder_layers": 0}, ValueError, "encoder_layers: expected 1 to 1024, got 0"),
    ({"encoder_embed_dim": 0}, ValueError, "encoder_embed_dim: expected 1 to 65536, got 0"),
    ({"encoder_embed_dim": -768}, ValueError, "encoder_embed_dim: expected 1 to 65536, got -768"),
    ({"encoder_ffn_embed_dim": 1 << 40}, ValueError,
     "encoder_ffn_embed_dim: expected an integer of 32 bits, got 1099511627776"),
    ({"encoder_attention_heads": 7}, ValueError,
     "encoder_attention_heads: expected a divisor of encoder_embed_dim "
                                                 "768, got 7"),
    ({"conv_pos_groups": 5}, ValueError,
     "conv_pos_groups: expected a divisor of encoder_embed_dim 768, got 5"),
    ({"conv_pos": 0}, ValueError, "conv_pos: expected 1 to 65536, got 0"),
    ({"num_buckets": 2}, ValueError, "num_buckets: expected 4 to 65536, got 2"),
    ({"max_distance": 80}, ValueError, r"max_distance: expected more than num_buckets / 4 = 80, got 80"),
    ({"relative_position_embedding": False}, ValueError, "gru_rel_pos: expected false without "
                                                         "relative_position_embedding, got true"),
    ({"conv_bias": True}, ValueError, 'conv_bias: expected false with extractor_mode "default", .*, got true'),
    ({"normalize": 1}, TypeError, "normalize: expected bool, got int 1"),
    ({"conv_bias": "no"}, TypeError, "conv_bias: expected bool, got str 'no'"),
    ({"dropout": 1.0}, ValueError, "dropout: expected at least 0 and below 1, got 1"),
    ({"attention_dropout": -0.1}, ValueError, "attention_dropout: expected at least 0 and below 1, got -0.1"),
    ({"activation_dropout": math.nan}, ValueError, "activation_dropout: expected a finite number, got nan"),
    ({"dropout": "0.1"}, TypeError, "dropout: expected float, got str '0.1'"),
    ({"dropout": np.zeros(3)}, TypeError, "dropout: expected float, got ndarray"),
    ({"feature_grad_mult": -1}, ValueError, "feature_grad_mult: expected 0 or more, got -1"),
    ({"normalize_eps": 0}, ValueError, "normalize_eps: expected above 0 to 1, got 0"),
    ({"feature_grad_mult": math.inf}, ValueError, "feature_grad_mult: expected a finite number, got inf"),
    ({"target_layers": ()}, ValueError,
     'target_layers: expected 1 to 64 layers for architecture "generative", got 0'),
    ({"target_layers": 4}, TypeError, "target_layers: expected a tuple of ints, got int 4"),
    ({"target_layers": (4, "8")}, TypeError, r"target_layers\[1\]: expected int, got str '8'"),
    ({"target_layers": (4, 4)}, ValueError, "target_layers: expected rising layers, got 4 after 4"),
    ({"target_layers": (8, 4)}, ValueError, "target_layers: expected rising layers, got 4 after 8"),
    ({"target_layers": (-1,)}, ValueError, r"target_layers\[0\]: expected 0 to 1024, got -1"),
    ({"target_layers": tuple(range(65))}, ValueError, "target_layers: expected at most 64 layers, got more"),
    ({"conv_feature_layers": ()}, ValueError, "conv_feature_layers: expected 1 to 16 layers, got 0"),
    ({"conv_feature_layers": ((1, 1, 1),) * 17}, ValueError,
     "conv_feature_layers: expected at most 16 layers, got more"),
    ({"conv_feature_layers": ((4, 4096, 4096),) * 6}, ValueError,
     r"conv_feature_layers: expected a frame of at most 2\^40 samples"),
    ({"conv_feature_layers": ((4, 1, 4096),) * 4}, ValueError,
     r"conv_feature_layers: expected a frame of at most 2\^40 samples"),
    ({"conv_feature_layers": ((65536, 4096, 1),) * 2}, ValueError,
     r"conv_feature_layers, .*: expected at most 2\^36 parameters"),
    ({"conv_feature_layers": 512}, TypeError, "conv_feature_layers: expected .* or a string, got int 512"),
    ({"conv_feature_layers": ((512, 10),)}, TypeError,
     r"conv_feature_layers\[0\]: expected \(dim, kernel, stride\), "
                                                       "got tuple of 2"),
    ({"conv_feature_layers": ((512, 10, 0),)}, ValueError,
     r"conv_feature_layers\[0\].stride: expected 1 to 4096, "
                                                           "got 0"),
    ({"layer_norm_first": True}, ValueError,
     'layer_norm_first: expected false for architecture "generative", got true'),
    ({"architecture": "encoder"}, ValueError,
     'skip_connection: expected false for architecture "encoder", got true'),
    ({**ENCODER, "output_layer": True}, ValueError,
     'output_layer: expected false for architecture "encoder", got true'),
    ({**ENCODER, "target_layers": (4,)}, ValueError,
     'target_layers: expected none for architecture "encoder", got 1'),
    ({**ENCODER, "position": "every_step"}, ValueError,
     'position: expected "once" for architecture "encoder", got "every_step"'),
    ({**ENCODER, "cross_attention": True}, ValueError,
     'cross_attention: expected false for architecture "encoder", got true'),
    ({**ENCODER, "architecture": "multi_head", "target_layers": (4,)}, ValueError,
     'output_layer: expected true for architecture "multi_head", got false'),
    ({**ENCODER, "architecture": "self_hidden", "encoder_layers": 2, "target_layers": (4,)}, ValueError,
     'target_layers: expected 2 or 3 layers for architecture "self_hidden" with 2 encoder_layers, got 1'),
])
def test_wrong_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        Config(**fields)


def belongs_together(architecture, skip, output, cross, position, pre_norm, layers, targets):
    """MODEL.md's table of architectures."""
    if architecture == "generative":
        return layers == 1 and bool(targets) and not pre_norm
    plain = not skip and not cross and position == "once"
    if architecture == "encoder":
        return plain and not output and not targets
    if architecture == "multi_head":
        return plain and output and bool(targets) and not pre_norm
    return plain and not output and not pre_norm and len(targets) in (layers, layers + 1)


@pytest.mark.parametrize("architecture", ["generative", "self_hidden", "multi_head", "encoder"])
def test_what_belongs_together(architecture):
    small = dict(conv_feature_layers=((4, 10, 5), (4, 3, 2)), encoder_embed_dim=8, encoder_ffn_embed_dim=8,
                 encoder_attention_heads=2, conv_pos=4, conv_pos_groups=2, num_buckets=8, max_distance=16)
    choices = dict(skip_connection=(True, False), output_layer=(True, False), cross_attention=(True, False),
                   position=("once", "every_step"), layer_norm_first=(True, False), encoder_layers=(1, 2),
                   target_layers=((), (4,), (4, 8), (4, 8, 12)))
    for values in itertools.product(*choices.values()):
        fields = {**small, **dict(zip(choices, values)), "architecture": architecture}
        if belongs_together(architecture, *values):
            gendistiller_ext.Model(Config(**fields))
        else:
            with pytest.raises(ValueError, match="expected"):
                Config(**fields)


@pytest.mark.parametrize("text, layers", [
    ("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", BASE_CONV_LAYERS),
    ("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", BASE_CONV_LAYERS),
    ("[(1,2,3)]", ((1, 2, 3),)),
    (" [ ( 1 ,2, 3 ) , (4,5,6), ]\t*2 \n", ((1, 2, 3), (4, 5, 6)) * 2),
    ("[(1,2,3)]*1+[(4,5,6)]", ((1, 2, 3), (4, 5, 6))),
    ("[(1,2,3)] * 0 + [(4,5,6)]", ((4, 5, 6),)),
])
def test_conv_layers_string(text, layers):
    assert parse_conv_feature_layers(text) == layers
    assert Config(conv_feature_layers=text).conv_feature_layers == layers


@pytest.mark.parametrize("text, message", [
    ("", r"expected '\[' at character 0 of '', got 'end'"),
    ("[]", r"expected '\(' at character 1"),
    ("[(512,10,5)", r"expected '\]' at character 11"),
    ("[(512,10)]", r"expected ',' at character 8"),
    ("[(512,10,5,1)]", r"expected '\)' at character 10"),
    ("[(512,10,-5)]", "expected a number at character 9"),
    ("[(512,10,5.0)]", r"expected '\)' at character 10"),
    ("[(512,10,5)] ** 2", "expected a number at character 14"),
    ("[(512,10,5)] 2", r"expected '\+', '\*' or the end at character 13"),
    ("[(512,10,5)] * 2 * 2", r"expected '\+', '\*' or the end at character 17"),
    ("[(512,10,5)] +", r"expected '\[' at character 14"),
    ("2 * [(512,10,5)]", r"expected '\[' at character 0"),
    ("__import__('os').system('true')", r"expected '\[' at character 0"),
    ("[(512,10,__import__('os'))]", "expected a number at character 9"),
    ("[(\u0661,10,5)]", "expected a number at character 2"),
    ("[(9999999999,10,5)]", "expected a number at character 2"),
    ("[(512,10,5)] * 999999999", "expected at most 16 layers, got more"),
    ("[(512,10,5)]" + " + [(512,3,2)] * 9" * 10_000, "expected at most 16 layers, got more"),
])
def test_conv_layers_string_is_parsed_not_evaluated(text, message):
    with pytest.raises(ValueError, match="conv_feature_layers: " + message):
        Config(conv_feature_layers=text)


def test_describing_endless_values_is_short():
    endless = ("x",)
    for _ in range(64):
        endless = (endless, endless)
    for field in ("encoder_layers", "target_layers", "conv_feature_layers", "padding", "dropout"):
        with pytest.raises((TypeError, ValueError)) as caught:
            Config(**{field: endless})
        assert len(str(caught.value)) < 300


def test_shapes_of_a_generative_model_in_order():
    attention = {f"{part}.{leaf}": (8, 8)[:2 - (leaf == "bias")]
                 for part in ("q_proj", "k_proj", "v_proj", "out_proj") for leaf in ("weight", "bias")}
    block = "encoder.layers.0."
    expected = {
        "feature_extractor.conv_layers.0.0.weight": (6, 1, 10),
        "feature_extractor.conv_layers.0.2.weight": (6,),
        "feature_extractor.conv_layers.0.2.bias": (6,), "feature_extractor.conv_layers.1.0.weight": (7, 6, 3),
        "layer_norm.weight": (7,), "layer_norm.bias": (7,), "post_extract_proj.weight": (8, 7),
        "post_extract_proj.bias": (8,), "encoder.pos_conv.0.weight_g": (1, 1, 4),
        "encoder.pos_conv.0.weight_v": (8, 4, 4), "encoder.pos_conv.0.bias": (8,),
        "encoder.layer_norm.weight": (8,),
        "encoder.layer_norm.bias": (8,), **{f"{block}self_attn.{name}": shape for name,
                                            shape in attention.items()},
        f"{block}self_attn.grep_linear.weight": (8, 4), f"{block}self_attn.grep_linear.bias": (8,),
        f"{block}self_attn.grep_a": (1, 2, 1, 1), f"{block}self_attn.relative_attention_bias.weight": (12, 2),
        f"{block}self_attn_layer_norm.weight": (8,), f"{block}self_attn_layer_norm.bias": (8,),
        **{f"{block}cross_attn.{name}": shape for name, shape in attention.items()},
        f"{block}cross_attn_layer_norm.weight": (8,), f"{block}cross_attn_layer_norm.bias": (8,),
        f"{block}fc1.weight": (10, 8), f"{block}fc1.bias": (10,), f"{block}fc2.weight": (8, 10),
        f"{block}fc2.bias": (8,), f"{block}final_layer_norm.weight": (8,),
        f"{block}final_layer_norm.bias": (8,),
        "output_layer.0.weight": (8, 8), "output_layer.0.bias": (8,), "output_layer.2.weight": (8, 8),
        "output_layer.2.bias": (8,),
    }
    shapes = Config(**SMALL, cross_attention=True).parameter_shapes()
    assert list(shapes.items()) == list(expected.items())


@pytest.mark.parametrize("fields, absent, present", [
    ({"feature_layer_norm": False}, "layer_norm.weight", {}),
    ({"encoder_embed_dim": 14, "encoder_attention_heads": 7, "conv_feature_layers": ((14, 3, 2),)},
     "post_extract_proj.weight", {"encoder.layers.0.self_attn.grep_linear.weight": (8, 2)}),
    ({"conv_bias": True, "extractor_mode": "layer_norm"}, "feature_extractor.conv_layers.0.2.weight",
     {"feature_extractor.conv_layers.1.0.bias": (7,), "feature_extractor.conv_layers.1.2.1.bias": (7,)}),
    ({"gru_rel_pos": False}, "encoder.layers.0.self_attn.grep_a",
     {"encoder.layers.0.self_attn.relative_attention_bias.weight": (12, 2)}),
    ({**ENCODER, "encoder_layers": 2}, "encoder.layers.1.self_attn.relative_attention_bias.weight",
     {"encoder.layers.1.self_attn.grep_a": (1, 2, 1, 1)}),
    ({"output_layer": False}, "output_layer.0.weight", {}),
    ({**ENCODER, "architecture": "multi_head", "output_layer": True, "target_layers": (1, 2, 3)},
     "encoder.layers.0.cross_attn.q_proj.weight",
     {"output_layer.0.weight": (24, 8), "output_layer.0.bias": (24,), "output_layer.2.weight": (3, 8, 8),
      "output_layer.2.bias": (1, 1, 3, 8)}),
])
def test_shapes_follow_the_fields(fields, absent, present):
    shapes = Config(**{**SMALL, **fields}).parameter_shapes()
    assert absent not in shapes
    assert {name: shapes.get(name) for name in present} == present


@pytest.mark.parametrize("changes", [
    SMALL, {**SMALL, "conv_feature_layers": ((8, 10, 5),)}, {**SMALL, "encoder_embed_dim": 14},
], ids=["small", "no projection", "odd"])
@pytest.mark.parametrize("name", [*STUDENTS, *TEACHERS])
def test_the_engine_has_the_same_tensors(name, changes):
    config = dataclasses.replace(Config.preset(name), **changes)
    model = gendistiller_ext.Model(config)
    assert {tensor.name: tuple(tensor.shape) for tensor in model.tensors} == config.parameter_shapes()
    assert model.num_params == count(config) and model.config == config


def test_documentation_names_every_field():
    for name in FIELDS:
        assert re.search(rf"\b{name}\b", Config.__doc__), name


def test_import_brings_no_big_module():
    code = ("import sys, gendistiller_ext.config, gendistiller_ext.checkpoints.foreign; "
            "big = {'torch', 's3prl', 'transformers', 'safetensors', 'zipfile', 'yaml'}; "
            "print(sorted(big & set(sys.modules)))")
    root = os.path.dirname(os.path.dirname(os.path.abspath(gendistiller_ext.__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": root})
    assert done.stdout.strip() == "[]"
