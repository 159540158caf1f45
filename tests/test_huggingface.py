"""Hugging Face folders and the safetensors in them, against transformers and against S3PRL's models."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest

from foreign_models import ENCODER, LARGE, hubert, scatter, wavlm
from gendistiller_ext.checkpoints import foreign
from gendistiller_ext.config import Config

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

HF = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20,
      "conv_dim": (6, 7, 7), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
      "num_feat_extract_layers": 3,
      "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "activation_dropout": 0.0,
      "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8, "vocab_size": 5}
HF_LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}


def transformers_model(kind: str, head: str = "Model", large=False, **changes):
    transformers = pytest.importorskip("transformers")
    name = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[kind]
    buckets = {"num_buckets": 12, "max_bucket_distance": 20} if kind == "wavlm" else {}
    config = getattr(transformers, f"{name}Config")(**{**HF, **buckets, **(HF_LARGE if large else {}),
                                                       **changes})
    return scatter(getattr(transformers, f"{name}{head}")(config))


def huggingface_config(kind: str, large=False, **changes) -> Config:
    wavlm_fields = {"relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": 12,
                    "max_distance": 20}
    return Config(**{**ENCODER, "feature_grad_mult": 0.1, **(wavlm_fields if kind == "wavlm" else {}),
                     **(LARGE if large else {}), **({"normalize_eps": 1e-7} if changes.get("normalize") else {}),
                     **changes})


def preprocessor(folder, **fields):
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16000, **fields}))


def s3prl_twin(kind: str, config: Config):
    """S3PRL's class of the same computation, whose tensors have our names."""
    changes = {"extractor_mode": config.extractor_mode, "conv_bias": config.conv_bias,
               "layer_norm_first": config.layer_norm_first}
    if kind == "wavlm":
        return wavlm(**changes)[0]
    return hubert(**changes, required_seq_len_multiple=1)[0]


def hidden_states(model, wav):
    """What S3PRL's expert hooks: each block's input, then the encoder's output."""
    states = []
    hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs: states.append(
        (args[0] if args else kwargs["x"]).transpose(0, 1)),
                                             with_kwargs=True) for layer in model.encoder.layers]
    with torch.no_grad():
        final = model.extract_features(wav, mask=False)[0]
    for hook in hooks:
        hook.remove()
    return states + [final]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind, head", [("wavlm", "Model"), ("wavlm", "ForCTC"), ("hubert", "Model"),
                                        ("hubert", "ForSequenceClassification"), ("wav2vec2", "Model"),
                                        ("wav2vec2", "ForPreTraining")])
@pytest.mark.parametrize("safe", [True, False])
def test_huggingface_computes_the_same(kind, head, large, safe, tmp_path):
    """The tensors, under our names, make S3PRL's model give what transformers' gives."""
    model = transformers_model(kind, head, large)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    preprocessor(tmp_path, do_normalize=large)
    read = foreign.read(tmp_path)
    config = huggingface_config(kind, large, normalize=large)
    assert read.format == "huggingface" and read.config == config
    assert {name: array.shape for name, array in read.tensors.items()} == config.parameter_shapes()
    used = len(read.tensors)
    assert len(read.ignored) == len(model.state_dict()) - used
    base = model if head == "Model" else getattr(model, kind)

    twin = s3prl_twin(kind, config)
    rest = twin.load_state_dict({name: torch.tensor(array) for name, array in read.tensors.items()},
                                strict=False)
    assert not rest.unexpected_keys
    assert all(name.startswith(("mask_emb", "final_proj", "label_embs")) for name in rest.missing_keys)
    wav = torch.randn(2, 400, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = base(wav, output_hidden_states=True).hidden_states
    ours = hidden_states(twin, wav)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs):
        assert float(b.abs().max()) > 0.1
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=2e-6)


@pytest.mark.parametrize("safe", [True, False])
def test_huggingface_shards(safe, tmp_path):
    model = transformers_model("wavlm")
    model.save_pretrained(tmp_path / "whole", safe_serialization=safe)
    model.save_pretrained(tmp_path / "shards", safe_serialization=safe, max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*-of-*"))) > 2
    for folder in ("whole", "shards"):
        preprocessor(tmp_path / folder, do_normalize=False)
    whole, shards = (foreign.read(tmp_path / folder) for folder in ("whole", "shards"))
    assert whole.config == shards.config and whole.ignored == shards.ignored == ["masked_spec_embed"]
    assert all(np.array_equal(whole.tensors[name],
                              shards.tensors[name]) for name in whole.config.parameter_shapes())


@pytest.mark.parametrize("safe", [True, False])
def test_huggingface_old_weight_norm_names(safe, tmp_path):
    model = transformers_model("hubert")
    model.save_pretrained(tmp_path, safe_serialization=safe)
    preprocessor(tmp_path, do_normalize=False)
    new = foreign.read(tmp_path)
    stem = "encoder.pos_conv_embed.conv."
    names = {f"{stem}parametrizations.weight.original0": f"{stem}weight_g",
             f"{stem}parametrizations.weight.original1": f"{stem}weight_v"}
    assert set(names) <= set(model.state_dict())
    state = {names.get(name, name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if safe:
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    old = foreign.read(tmp_path)
    assert all(np.array_equal(new.tensors[name], old.tensors[name]) for name in new.config.parameter_shapes())


def test_distilhubert_as_hugging_face_has_it(tmp_path):
    model = transformers_model("hubert", feat_proj_layer_norm=False)
    assert "feature_projection.layer_norm.weight" not in model.state_dict()
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path, do_normalize=True)
    read = foreign.read(tmp_path)
    assert read.config == huggingface_config("hubert", feature_layer_norm=False, normalize=True)
    assert "layer_norm.weight" not in read.tensors
    np.testing.assert_array_equal(read.tensors["post_extract_proj.weight"],
                                  model.feature_projection.projection.weight.detach().numpy())


def test_huggingface_without_do_normalize_warns(tmp_path):
    transformers_model("hubert").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="preprocessor_config.json: no such file to say do_normalize; "
                                         "taken as False") as caught:
        assert foreign.read(tmp_path).config.normalize is False
    assert caught[0].filename == __file__


def test_huggingface_by_its_weights_file(tmp_path):
    model = transformers_model("hubert")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    preprocessor(tmp_path, do_normalize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("model.safetensors", "pytorch_model.bin"):
            assert foreign.read(tmp_path / name).format == "huggingface"
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: expected config\.json beside it"):
        foreign.read(tmp_path / "model.safetensors")
    with pytest.raises(ValueError,
                       match=r"pytorch_model\.bin: expected a WavLM .* got a dict of 'masked_spec_embed'"):
        foreign.read(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="config.json"):
        foreign.read(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "bert"}, "model_type: expected wavlm, hubert, wav2vec2, .*, got str 'bert'"),
    ({"model_type": ["wavlm"]}, "model_type: expected wavlm, hubert, wav2vec2, .*, got list of 1"),
    ({"hidden_act": "gelu_new"}, "hidden_act: expected 'gelu', got str 'gelu_new'"),
    ({"feat_extract_activation": "relu"}, "feat_extract_activation: expected 'gelu', got str 'relu'"),
    ({"layer_norm_eps": 1e-12}, "layer_norm_eps: expected 1e-05, got float 1e-12"),
    ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm: expected False, got bool True"),
    ({"feat_extract_norm": "batch"}, "feat_extract_norm: expected 'group' or 'layer', got str 'batch'"),
    ({"feat_extract_norm": ["group"]}, "feat_extract_norm: expected 'group' or 'layer', got list of 1"),
    ({"conv_kernel": [10, 3]}, "conv_dim, conv_kernel, conv_stride: expected lists of one length"),
    ({"hidden_size": "12"}, r"hidden_size \(encoder_embed_dim\): expected int, got str '12'"),
    ({"hidden_size": 15},
     r"num_conv_pos_embedding_groups \(conv_pos_groups\): expected a divisor of encoder_embed_dim 15, got 2"),
    ({"intermediate_size": 21},
     r"encoder\.layers\.0\.feed_forward\.intermediate_dense\.weight: expected shape "
                                r"\(21, 12\), got \(20, 12\)"),
    ({"num_hidden_layers": 3},
     r"missing encoder\.layers\.2\.attention\.q_proj\.weight \(12, 12\), .* and 6 more"),
    ({"num_hidden_layers": 1}, r"unexpected encoder\.layers\.1\.\S+, .* and 6 more"),
])
def test_huggingface_wrong_configs(change, message, tmp_path):
    transformers_model("hubert").save_pretrained(tmp_path)
    preprocessor(tmp_path, do_normalize=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        foreign.read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name, text, message", [
    ("config.json", "{", "config.json: not the JSON that was expected"),
    ("config.json", "[]", "config.json: expected a JSON object, got list"),
    ("config.json", '{"model_type": "hubert", "model_type": "wavlm"}', "config.json: .*a key occurs twice"),
    ("config.json", "[" * 100_000, "config.json: not the JSON that was expected"),
    ("preprocessor_config.json", '{"do_normalize": 1}', "do_normalize: expected true or false, got int 1"),
    ("model.safetensors.index.json", "{}", "index.json: expected an object weight_map"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../../etc/passwd"}}',
     "a: expected a file name, got str"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors.index.json"}}',
     "expected a file name"),
    ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "a: expected a file name, got int 3"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "part.safetensors"}}',
     "a: missing in part.safetensors"),
])
def test_huggingface_damaged_json(name, text, message, tmp_path):
    transformers_model("hubert").save_pretrained(tmp_path)
    preprocessor(tmp_path, do_normalize=False)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    if "index" not in name:
        (tmp_path / "part.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        foreign.read(tmp_path)


def test_huggingface_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    with pytest.raises(ValueError,
                       match="expected one of model.safetensors, .*pytorch_model.bin.index.json, got none"):
        foreign.read(tmp_path)


def test_hugging_face_configs_with_anything_anywhere(tmp_path):
    transformers_model("wavlm").save_pretrained(tmp_path)
    preprocessor(tmp_path, do_normalize=False)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    junk = [None, True, -1, 0, 10 ** 30, 2.5, float("nan"), "", [], [1], [[1], 2], {}, {"a": 1}]
    random_ = random.Random(1)
    refused = 0
    for _ in range(150):
        path.write_text(json.dumps({**good, random_.choice(list(good)): random_.choice(junk)}))
        try:
            foreign.read(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and len(str(error)) < 2000
            refused += 1
    assert refused > 30
