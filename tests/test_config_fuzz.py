"""Random configs, legal and not, as keyword arguments and as a checkpoint's JSON: an error that names a field, or a
model that runs; never a crash, and no memory that nobody could have."""

from __future__ import annotations

import json

import numpy as np
import pytest

import gendistiller_ext as gd
from checkpoint_bytes import pack
from conftest import SMALL

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st  # noqa: E402

fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NAMES = tuple(gd.Config().to_dict())
RANDOM = np.random.default_rng(0).uniform(-0.1, 0.1, 100_000).astype(np.float32)
#: Of a model, and of a pass: larger ones are only checked.
MOST_PARAMS, MOST_SAMPLES = 3_000_000, 50_000

sizes = st.sampled_from([1, 2, 3, 4, 7, 16, 33, 320, 4095, 4096, 65535, 65536, 65537, 2 ** 31 - 1, 2 ** 31, 2 ** 63,
                         -1, 0])
small = st.integers(1, 6)
numbers = st.sampled_from([0, 0.1, 0.5, 1 - 1e-9, 1, -0.1, 1e-7, 1e-300, 1e300])
layer = st.tuples(st.one_of(small, sizes), st.one_of(small, sizes), st.one_of(small, sizes))
FIELDS = {
    "architecture": st.sampled_from(["generative", "self_hidden", "multi_head", "encoder", "decoder"]),
    "extractor_mode": st.sampled_from(["default", "layer_norm", ""]),
    "conv_feature_layers": st.lists(layer, min_size=1, max_size=9),
    "target_layers": st.lists(st.one_of(small, sizes), max_size=4),
    "position": st.sampled_from(["once", "every_step"]),
    "padding": st.sampled_from(["exact", "s3prl"]),
    **dict.fromkeys(("normalize_eps", "dropout", "attention_dropout", "activation_dropout", "feature_grad_mult"),
                    numbers),
    **dict.fromkeys(("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads",
                     "conv_pos", "conv_pos_groups", "num_buckets", "max_distance"), st.one_of(small, small, sizes)),
}
changes = st.dictionaries(st.sampled_from(NAMES), st.none(), max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS.get(name, st.booleans()) for name in names}))


def run(config: gd.Config) -> None:
    """Forward, and where it can be a training step, on the shortest utterance and one a few frames longer."""
    if config.num_params > MOST_PARAMS or config.min_samples + 3 * config.hop > MOST_SAMPLES:
        return
    model = gd.Model(config, seed=1)
    wavs = [RANDOM[:config.min_samples], RANDOM[:config.min_samples + 3 * config.hop]]
    hidden, frames = model.forward(wavs)
    assert len(hidden) == config.num_states and frames.min() >= 1 and frames.max() == hidden[0].shape[1]
    if config.architecture != "encoder":
        targets = np.zeros((len(config.target_layers), 2, hidden[0].shape[1], config.encoder_embed_dim), np.float32)
        assert model.distill_step(wavs, targets).flat_grads.shape == (config.num_params,)


@fuzz
@given(changes)
def test_any_fields(fields):
    try:
        config = gd.Config(**{**SMALL, **fields})
    except (ValueError, TypeError) as error:
        assert any(str(error).startswith(name) for name in NAMES), error
        return
    assert 1 <= config.min_samples <= 2 ** 40 and 1 <= config.hop <= 2 ** 40
    assert config.num_params == sum(int(np.prod(shape, dtype=object)) for shape in config.parameter_shapes().values())
    run(config)


@fuzz
@given(fields=st.dictionaries(st.sampled_from(NAMES + ("unknown",)), st.one_of(
    sizes, numbers, st.booleans(), st.none(), st.lists(st.lists(sizes, max_size=4), max_size=3), st.text(max_size=3)),
    max_size=3))
def test_any_json_in_a_checkpoint(tmp_path_factory, fields):
    """No tensors beside it: an error in any case, which names the file."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    fields = {**SMALL, **fields}
    path.write_bytes(pack({"__metadata__": {"gendistiller": json.dumps(fields)}}, b""))
    with pytest.raises(ValueError, match="fuzz.safetensors: "):
        gd.Model.load(path)
