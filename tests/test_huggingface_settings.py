"""Every setting of the classes of transformers that are read, and of their feature extractor, at another value than its
default: understood, of no effect on the hidden states, or refused by name. A setting that is in none of the tables
fails."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gendistiller_ext as gd
from foreign_models import scatter
from gendistiller_ext.checkpoints import foreign, huggingface

pytestmark = [pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
              pytest.mark.filterwarnings("ignore:Some non-default generation parameters:UserWarning")]

NAMES = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2", "unispeech": "UniSpeech",
         "unispeech-sat": "UniSpeechSat"}
SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20,
         "conv_dim": [6, 7, 7], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 2}
TOLERANCE = 2e-4

#: Name -> other values, each with what has to go with it.
UNDERSTOOD = {
    "hidden_size": [{"hidden_size": 24}], "num_hidden_layers": [{"num_hidden_layers": 3}],
    "num_attention_heads": [{"num_attention_heads": 2}], "intermediate_size": [{"intermediate_size": 28}],
    "conv_dim": [{"conv_dim": [5, 9, 8]}, {"conv_dim": [6, 7, 12]}, {"conv_dim": [6, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2]}],
    "conv_kernel": [{"conv_kernel": [8, 4, 2]}], "conv_stride": [{"conv_stride": [4, 3, 1]}],
    "conv_bias": [{"conv_bias": True, "feat_extract_norm": "layer"}],
    "feat_extract_norm": [{"feat_extract_norm": "layer"}],
    "num_conv_pos_embeddings": [{"num_conv_pos_embeddings": 7}],
    "num_conv_pos_embedding_groups": [{"num_conv_pos_embedding_groups": 3}],
    "do_stable_layer_norm": [{"do_stable_layer_norm": True}], "feat_proj_layer_norm": [{"feat_proj_layer_norm": False}],
    "num_buckets": [{"num_buckets": 12, "max_bucket_distance": 30}],
    "max_bucket_distance": [{"max_bucket_distance": 90}],
    "hidden_dropout": [{"hidden_dropout": 0.3}], "attention_dropout": [{"attention_dropout": 0.3}],
    "activation_dropout": [{"activation_dropout": 0.3}],
}
REFUSED = {"hidden_act": ["relu", "gelu_new"], "feat_extract_activation": ["relu"], "layer_norm_eps": [1e-12, 1e-6],
           "add_adapter": [True], "adapter_attn_dim": [8], "conv_pos_batch_norm": [True], "pruned_heads": [{"0": [1]}],
           "model_type": ["bert", "data2vec-audio", "wav2vec2-bert"]}
#: Of heads, losses, training's masks and dropout.
HARMLESS = {
    "vocab_size": 5, "initializer_range": 0.5, "layerdrop": 0.9, "feat_proj_dropout": 0.9, "final_dropout": 0.9,
    "feat_quantizer_dropout": 0.9, "apply_spec_augment": False, "mask_time_prob": 0.9, "mask_time_length": 3,
    "mask_time_min_masks": 1, "mask_feature_prob": 0.9, "mask_feature_length": 2, "mask_feature_min_masks": 1,
    "num_codevectors_per_group": 4, "num_codevector_groups": 1, "contrastive_logits_temperature": 0.7,
    "num_negatives": 3, "codevector_dim": 6, "proj_codevector_dim": 6, "diversity_loss_weight": 0.7,
    "ctc_loss_reduction": "none", "ctc_zero_infinity": True, "use_weighted_layer_sum": True, "classifier_proj_size": 3,
    "tdnn_dim": [3, 3], "tdnn_kernel": [2, 2], "tdnn_dilation": [1, 1], "xvector_output_dim": 3, "num_ctc_classes": 9,
    "adapter_kernel_size": 5, "adapter_stride": 3, "num_adapter_layers": 1, "output_hidden_size": 30,
    "num_feat_extract_layers": 9, "replace_prob": 0.9, "num_clusters": 7,
}
#: Of PretrainedConfig: what a call returns, generation, bookkeeping.
HARMLESS |= {
    "return_dict": False, "output_hidden_states": True, "output_attentions": True, "torchscript": True,
    "dtype": "float16", "torch_dtype": "float16", "tie_word_embeddings": False, "chunk_size_feed_forward": 3,
    "is_encoder_decoder": True, "is_decoder": True, "cross_attention_hidden_size": 9, "add_cross_attention": True,
    "tie_encoder_decoder": True, "architectures": ["X"], "finetuning_task": "x", "id2label": {"0": "a"},
    "label2id": {"a": 0}, "task_specific_params": {"x": 1}, "problem_type": "regression", "tokenizer_class": "X",
    "prefix": "x", "bos_token_id": 7, "pad_token_id": 3, "eos_token_id": 8, "sep_token_id": 9,
    "decoder_start_token_id": 4, "max_length": 9, "min_length": 3, "do_sample": True, "early_stopping": True,
    "num_beams": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "typical_p": 0.5, "repetition_penalty": 2.0,
    "length_penalty": 2.0, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[3]],
    "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True, "forced_bos_token_id": 3,
    "forced_eos_token_id": 3, "remove_invalid_values": True, "exponential_decay_length_penalty": [3, 1.1],
    "suppress_tokens": [3], "begin_suppress_tokens": [3], "num_beam_groups": 3, "diversity_penalty": 0.5,
    "_name_or_path": "x/y", "transformers_version": "3.0.0", "tf_legacy_loss": True, "use_bfloat16": True,
    "gradient_checkpointing": True, "a_setting_of_nobodys": [1, {"x": 2}],
}
HEARD_UNDERSTOOD = {"do_normalize": [True, False]}
HEARD_REFUSED = {"sampling_rate": [8000, 16001, "16000", None], "feature_size": [2, 80],
                 "feature_extractor_type": ["WhisperFeatureExtractor", "SeamlessM4TFeatureExtractor", 3]}
HEARD_HARMLESS = {"padding_value": -7.0, "padding_side": "left", "return_attention_mask": True,
                  "processor_class": "Wav2Vec2Processor", "_processor_class": "X", "a_setting_of_nobodys": 1}


def attributes(kind) -> set[str]:
    config = getattr(transformers, f"{NAMES[kind]}Config")()
    return set(config.to_dict()) | {name for name in vars(config) if not name.startswith("_")}


def model_of(kind, settings):
    torch.manual_seed(0)
    return scatter(getattr(transformers, f"{NAMES[kind]}Model")(
        getattr(transformers, f"{NAMES[kind]}Config")(**{**SMALL, **settings})))


def write(folder, kind, model, settings, heard=None):
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, **settings}))
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False, **(heard or {})}))


def assert_same_states(folder, model):
    """transformers' model hears what its own feature extractor makes of the audio."""
    ours = gd.Model.load(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    for samples, gain in ((400, 1), (3000, 1), (3000, 1e-2), (3000, 1e-4)):
        wav = (gain * np.random.default_rng(samples).uniform(-0.5, 0.5, samples)).astype(np.float32)
        given = extractor(wav, sampling_rate=16000, return_tensors="pt").input_values
        with torch.no_grad():
            theirs = model(given, output_hidden_states=True, output_attentions=False, return_dict=True).hidden_states
        states, _ = ours.forward([wav])
        assert len(states) == len(theirs)
        for a, b in zip(states, theirs):
            assert a.shape == tuple(b.shape) and np.abs(a).max() > 0.1
            assert np.abs(a - b.numpy()).max() < TOLERANCE * max(1.0, np.abs(a).max())


@pytest.mark.parametrize("kind", NAMES)
def test_no_setting_is_unaccounted_for(kind):
    tables = (UNDERSTOOD, REFUSED, HARMLESS)
    unknown = attributes(kind) - set().union(*tables)
    assert not unknown, f"settings that nobody has looked at: {sorted(unknown)}"
    assert sum(map(len, tables)) == len(set().union(*tables))
    defaults = getattr(transformers, f"{NAMES[kind]}Config")().to_dict()
    for name, value in HARMLESS.items():
        assert name not in defaults or defaults[name] != value or name in ("_name_or_path",), name


def test_every_family_is_held_against_transformers():
    assert set(NAMES) == set(huggingface.FAMILIES)


def test_no_setting_of_the_extractor_is_unaccounted_for():
    extractor = transformers.Wav2Vec2FeatureExtractor()
    known = {**HEARD_UNDERSTOOD, **HEARD_REFUSED, **HEARD_HARMLESS}
    assert set(extractor.to_dict()) | set(vars(extractor)) <= set(known)


@pytest.mark.parametrize("kind, name, change", [
    (kind, name, change) for kind in NAMES for name, changes in UNDERSTOOD.items() for change in changes
    if name in attributes(kind)])
def test_understood(kind, name, change, tmp_path):
    model = model_of(kind, change)
    write(tmp_path, kind, model, change)
    assert_same_states(tmp_path, model)
    read = foreign.inspect(tmp_path).config
    if "dropout" in name:  # no forward pass shows it
        assert getattr(read, name.replace("hidden_", "")) == 0.3


@pytest.mark.parametrize("kind", NAMES)
def test_defaults_are_the_classes(kind):
    """A file that says less than save_pretrained writes."""
    every = {key: list(value) if isinstance(value, tuple) else value
             for key, value in getattr(transformers, f"{NAMES[kind]}Config")().to_dict().items()}
    assert huggingface._fields({"model_type": kind}, "x") == huggingface._fields(every, "x")


@pytest.mark.parametrize("kind", NAMES)
def test_harmless(kind, tmp_path):
    """All of them at once: transformers' states, built with them, are the states without them."""
    own = {name: value for name, value in HARMLESS.items() if name in attributes(kind)}
    model = model_of(kind, {name: value for name, value in own.items()
                            if name not in ("dtype", "torch_dtype", "torchscript", "tie_encoder_decoder",
                                            "num_feat_extract_layers", "transformers_version")})
    write(tmp_path, kind, model, HARMLESS, HEARD_HARMLESS)
    assert_same_states(tmp_path, model)
    plain = model_of(kind, {})
    plain.load_state_dict(model.state_dict(), strict=False)
    assert_same_states(tmp_path, plain)


@pytest.mark.parametrize("kind, name, value", [
    (kind, name, value) for kind in NAMES for name, values in REFUSED.items() for value in values])
def test_refused(kind, name, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, name: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {name}: expected "):
        foreign.inspect(tmp_path)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in HEARD_REFUSED.items() for value in values])
def test_refused_of_the_extractor(name, value, tmp_path):
    write(tmp_path, "hubert", model_of("hubert", {}), {}, {name: value})
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {name}: expected "):
        foreign.inspect(tmp_path)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("change", [{}, {"feat_extract_norm": "layer", "do_stable_layer_norm": True}])
def test_normalized_audio_is_the_extractors(kind, change, tmp_path):
    """Also at a ten-thousandth of full scale, where what is added to the variance is most of it."""
    model = model_of(kind, change)
    write(tmp_path, kind, model, change, {"do_normalize": True})
    assert_same_states(tmp_path, model)
    read = foreign.inspect(tmp_path).config
    assert (read.normalize, read.normalize_eps) == (True, 1e-7)
    write(tmp_path, kind, model, change)
    assert foreign.inspect(tmp_path).config.normalize_eps == gd.Config().normalize_eps  # so that hashes agree


def test_messages_have_the_files_names(tmp_path):
    for change, message in (({"hidden_size": "12"}, r"hidden_size \(encoder_embed_dim\): expected int, got str '12'"),
                            ({"num_hidden_layers": 0}, r"num_hidden_layers \(encoder_layers\): expected 1 to"),
                            ({"conv_bias": 3}, "conv_bias: expected bool, got int 3")):
        write(tmp_path, "wavlm", model_of("wavlm", {}), change)
        with pytest.raises(ValueError, match=message):
            foreign.inspect(tmp_path)


def test_what_another_class_reads_has_no_effect(tmp_path):
    """WavLM and wav2vec 2.0 always have the projection's norm, HuBERT has no buckets."""
    for kind, settings in (("wavlm", {"feat_proj_layer_norm": False}), ("wav2vec2", {"feat_proj_layer_norm": False}),
                           ("hubert", {"num_buckets": 3, "max_bucket_distance": 1})):
        model = model_of(kind, settings)
        write(tmp_path, kind, model, settings)
        assert_same_states(tmp_path, model)


def test_the_extractors_default_is_to_normalize(tmp_path):
    model = model_of("hubert", {})
    write(tmp_path, "hubert", model, {})
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert foreign.inspect(tmp_path).config.normalize is transformers.Wav2Vec2FeatureExtractor().do_normalize is True
