"""Paths of the data, seeds and small configurations that the tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch loads OpenMP: threads that wait must not spin, where the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

SEED = 20240613

#: Base's kernels and strides (400 samples to the first frame, 320 a frame) at a width of a few channels.
SMALL_CONV = ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2
SMALL = {
    "conv_feature_layers": SMALL_CONV,
    "encoder_embed_dim": 12,
    "encoder_ffn_embed_dim": 20,
    "encoder_attention_heads": 3,
    "conv_pos": 8,
    "conv_pos_groups": 2,
    "target_layers": (4, 8),
    "feature_grad_mult": 1.0,
}

#: Student configurations of the generative kind: the preset's structure at every awkward size.
SMALL_CONFIGS = {
    "small": SMALL,
    "plain": {
        **SMALL,
        "feature_layer_norm": False,
        "relative_position_embedding": False,
        "gru_rel_pos": False,
    },
    "bias_without_gate": {**SMALL, "gru_rel_pos": False},
    "odd_widths": {
        **SMALL,
        "encoder_embed_dim": 35,
        "encoder_ffn_embed_dim": 33,
        "encoder_attention_heads": 5,
        "conv_pos_groups": 7,
        "conv_pos": 13,
        "conv_feature_layers": (
            (11, 10, 5),
            (9, 3, 2),
            (17, 3, 2),
            (5, 3, 2),
            (7, 3, 2),
            (13, 2, 2),
            (19, 2, 2),
        ),
    },
    "no_projection": {
        **SMALL,
        "encoder_embed_dim": 16,
        "encoder_attention_heads": 2,
        "conv_feature_layers": ((16, 10, 5),) + ((16, 3, 2),) * 4 + ((16, 2, 2),) * 2,
    },
    "projection_of_the_same_width": {
        **SMALL,
        "encoder_embed_dim": 16,
        "encoder_attention_heads": 2,
        "conv_feature_layers": ((16, 10, 5),) + ((16, 3, 2),) * 4 + ((16, 2, 2),) * 2,
        "feature_projection": True,
    },
    "one_head": {**SMALL, "encoder_attention_heads": 1, "target_layers": (4,)},
    "vector_widths": {
        **SMALL,
        "encoder_embed_dim": 64,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 2,
        "conv_pos": 128,
        "conv_pos_groups": 4,
        "target_layers": (4, 8, 12),
        "conv_feature_layers": ((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),) * 2,
    },
    "few_buckets": {**SMALL, "num_buckets": 12, "max_distance": 20},
    "one_conv": {**SMALL, "conv_feature_layers": ((10, 40, 20),), "conv_pos": 1, "conv_pos_groups": 1},
    "padded_as_s3prl": {**SMALL, "padding": "s3prl"},
    "layer_norm_extractor": {**SMALL, "extractor_mode": "layer_norm", "conv_bias": True, "normalize": True},
    "normalize": {**SMALL, "normalize": True},
    "normalize_eps": {**SMALL, "normalize": True, "normalize_eps": 1e-3},
    "extractor_slowed": {**SMALL, "feature_grad_mult": 0.1},
    "extractor_frozen": {**SMALL, "feature_grad_mult": 0.0},
}

_PLAIN = {"relative_position_embedding": False, "gru_rel_pos": False}
_FIXED = {"skip_connection": False, "output_layer": False}
_ENCODER = {**SMALL, **_FIXED, "architecture": "encoder", "encoder_layers": 3, "target_layers": ()}
_LARGE = {**_ENCODER, "layer_norm_first": True, "normalize": True, "extractor_mode": "layer_norm"}

#: Teachers: forward only.
SMALL_TEACHERS = {
    "wavlm": _ENCODER,
    "hubert": {**_ENCODER, **_PLAIN},
    "wavlm_large": _LARGE,
    "hubert_large": {**_LARGE, **_PLAIN, "conv_bias": True, "encoder_layers": 2},
}

#: What Table 3 compares, and what the paper leaves open.
SMALL_VARIANTS = {
    "self_hidden": {
        **SMALL,
        **_FIXED,
        "architecture": "self_hidden",
        "encoder_layers": 2,
        "target_layers": (4, 8, 12),
    },
    "self_hidden_three": {
        **SMALL,
        **_FIXED,
        "architecture": "self_hidden",
        "encoder_layers": 3,
        "target_layers": (4, 8, 12),
    },
    "multi_head": {
        **SMALL,
        **_PLAIN,
        "architecture": "multi_head",
        "encoder_layers": 2,
        "skip_connection": False,
        "target_layers": (4, 8, 12),
        "feature_layer_norm": False,
    },
    # Wider than a product's panel: a gradient over its own operand would show.
    "cross_attention": {**SMALL, **_FIXED, "cross_attention": True, "encoder_embed_dim": 36},
    "neither": {**SMALL, **_FIXED},
    "skip_only": {**SMALL, "output_layer": False},
    "output_only": {**SMALL, "skip_connection": False},
    "every_step": {**SMALL, "position": "every_step", "target_layers": (4, 8, 12)},
}


def _shared(name: str) -> Path:
    """`../shared/<name>` beside the checkout; GENDISTILLER_DATA names the `data` folder elsewhere."""
    root = os.environ.get("GENDISTILLER_DATA")
    data = Path(root) if root else HERE.parent.parent / "shared" / "data"
    return data if name == "data" else data.parent / name


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real speech: the folder that holds manifest.tsv."""
    path = _shared("data")
    if not (path / "manifest.tsv").is_file():
        pytest.skip(f"no speech: {path}/manifest.tsv is absent (GENDISTILLER_DATA names another folder)")
    return path


@pytest.fixture(scope="session")
def teacher_path() -> Path:
    """A small real teacher in unilm's WavLM format."""
    path = _shared("teacher") / "wavlm_tiny.pt"
    if not path.is_file():
        pytest.skip(f"no teacher: {path} is absent (looked for beside the data folder)")
    return path


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory):
    """The CUDA backend for an emulated device, built once."""
    from emulated import Builds

    return Builds(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What small runs learn from: a teacher's path and a folder of audio."""
    from runs import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))
