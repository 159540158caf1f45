"""Named configurations: fields that differ from `Config()`, which is `gendistiller`.

Students: the rows of the tables of Gao et al. (arXiv 2406.09444) and S3PRL's DistilHuBERT. Teachers: WavLM
(unilm), HuBERT and wav2vec 2.0 (fairseq); widths, norms, biases, dropout and `normalize` as torchaudio's
pipelines (torchaudio/pipelines/_wav2vec2/impl.py) have them.
"""

from __future__ import annotations

from typing import Any

_PLAIN = {"relative_position_embedding": False, "gru_rel_pos": False}
_SELF_HIDDEN = {"architecture": "self_hidden", "skip_connection": False, "output_layer": False,
                "target_layers": (4, 8, 12)}
_NO_OUTPUT = {"skip_connection": False, "output_layer": False, "target_layers": (4, 8, 12)}
_DISTILLER = {"architecture": "multi_head", "encoder_layers": 2, "feature_layer_norm": False,
              "skip_connection": False, "target_layers": (4, 8, 12), **_PLAIN}

_TEACHER = {"architecture": "encoder", "encoder_layers": 12, "activation_dropout": 0.0,
            "skip_connection": False, "output_layer": False, "target_layers": ()}
_LARGE = {**_TEACHER, "encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096,
          "encoder_attention_heads": 16}
# The large models of 60,000 hours: pre-norm blocks, LayerNorm after each convolution, normalized audio.
_LARGE_60K = {**_LARGE, "extractor_mode": "layer_norm", "layer_norm_first": True, "normalize": True,
              "feature_grad_mult": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    "gendistiller": {},
    "gendistiller_plain": {**_PLAIN, "feature_layer_norm": False},
    "table3_feat_2layers": {**_SELF_HIDDEN, "encoder_layers": 2},
    "table3_3layers": {**_SELF_HIDDEN, "encoder_layers": 3},
    "table3_1layer": _NO_OUTPUT,
    "table3_cross_attention": {**_NO_OUTPUT, "cross_attention": True},
    "table3_skip": {**_NO_OUTPUT, "skip_connection": True},
    "table3_output": {**_NO_OUTPUT, "output_layer": True},
    "table4_ffn2048": {"encoder_ffn_embed_dim": 2048},
    "table4_ffn1536": {"encoder_ffn_embed_dim": 1536},
    "table4_conv256": {"conv_feature_layers": "[(256,10,5)] + [(256,3,2)] * 4 + [(256,2,2)] * 2"},
    "table5_12": {"target_layers": (12,)},
    "table5_4_12": {"target_layers": (4, 12)},
    "table5_4_8_12": {"target_layers": (4, 8, 12)},
    "table5_4_6_8_12": {"target_layers": (4, 6, 8, 12)},
    "distilhubert": _DISTILLER,
    "distilwavlm": _DISTILLER,
    "wavlm_base": _TEACHER,
    "wavlm_base_plus": _TEACHER,
    "wavlm_large": _LARGE_60K,
    "hubert_base": {**_TEACHER, **_PLAIN},
    "hubert_large": {**_LARGE_60K, **_PLAIN, "dropout": 0.0, "attention_dropout": 0.0},
    "wav2vec2_base": {**_TEACHER, **_PLAIN},
    "wav2vec2_large": {**_LARGE, **_PLAIN, "dropout": 0.0},
    "wav2vec2_large_lv60": {**_LARGE_60K, **_PLAIN, "conv_bias": True, "dropout": 0.0},
}
