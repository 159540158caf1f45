"""bfloat16 and int8: how near float32 the states are, and the same promises of bits. What one product computes is
tests/ops' business."""

from __future__ import annotations

import numpy as np
import pytest

from checks import assert_rows_alone, bits
from conftest import SEED, SMALL_CONFIGS, SMALL_TEACHERS
from engine import build, gd, run_elsewhere
from reference.layout import random_state, random_targets, random_wavs

PRECISIONS = ("bfloat16", "int8")
#: Smallest cosine of a layer's states with float32's, over real speech: the spec has 0.99 for int8, random models
#: 0.9989.
COSINE = {"bfloat16": 0.9995, "int8": 0.998}
CONFIGS = {
    "vector_widths": SMALL_CONFIGS["vector_widths"],
    "odd_widths": {**SMALL_CONFIGS["odd_widths"], "encoder_ffn_embed_dim": 1031},
    "layer_norm_first": {**SMALL_TEACHERS["wavlm_large"], "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 70},
    "multi_head": {**SMALL_CONFIGS["vector_widths"], "architecture": "multi_head", "encoder_layers": 2,
                   "skip_connection": False, "relative_position_embedding": False,
                   "gru_rel_pos": False},
}
#: Each leaves another kernel for a precision's products.
MASKS = {"bfloat16": ("", "amx_bf16", "amx_bf16,avx512_bf16", "avx512", "avx512,avx2,neon"),
         "int8": ("", "amx_int8", "amx_int8,avx512_vnni", "avx512,avx_vnni", "avx512,avx2,neon")}


def cosines(hidden, expected, frames):
    """Of all frames' states together, layer by layer."""
    values = []
    for a, b in zip(hidden, expected, strict=True):
        a, b = (np.concatenate([x[i, :n] for i, n in enumerate(frames)]).astype(np.float64) for x in (a, b))
        values.append((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return np.array(values)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mask", range(5))
def test_batch_is_alone(precision, mask, tmp_path):
    lengths = [5000, 400, 16000, 719]
    wavs = random_wavs(lengths, SEED)
    runs = [{"wavs": [w], "num_threads": 1 + i % 2, "precision": precision} for i, w in enumerate(wavs)]
    runs += [{"wavs": order, "num_threads": threads, "precision": precision}
             for order, threads in ((wavs, 1), (wavs, 2), (wavs[::-1], 2))]
    models = {name: {"config": config, "state": random_state(config, SEED), "runs": runs}
              for name, config in CONFIGS.items()}
    results = run_elsewhere(models, tmp_path, MASKS[precision][mask])
    for name, model in models.items():
        *alone, one, two, reverse = results[name]
        assert_rows_alone(one, alone, lengths, model["config"])
        assert_rows_alone(two, alone, lengths, model["config"])
        assert_rows_alone(reverse, alone[::-1], lengths[::-1], model["config"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_instruction_sets_agree(precision, tmp_path):
    """The same factors whatever multiplies them: what is left is the rounding of sums, and of later activations that
    lie near the middle between two integers or bfloat16 numbers. AMX's are others, without minimal filtering, and round
    less."""
    config = CONFIGS["vector_widths"]
    wavs = random_wavs([16000, 5000], SEED)
    models = {"model": {"config": config, "state": random_state(config, SEED),
                        "runs": [{"wavs": wavs, "precision": p} for p in (precision, "float32")]}}
    results = [run_elsewhere(models, tmp_path, mask)["model"] for mask in MASKS[precision]]
    (direct, _), _ = results[0]
    (first, frames), (exact, _) = results[1]
    rounding = 1 - cosines(first, exact, frames)
    assert (rounding > 1e-7).all() and (1 - cosines(direct, exact, frames) < 1.05 * rounding).all()
    for (hidden, _), _ in results[2:]:
        apart = (1 - cosines(hidden, first, frames)) / rounding
        assert apart[0] < 0.05 and (apart < 0.5).all(), apart


def speech(data_dir):
    """Six clips of LibriSpeech, up to four seconds of each."""
    soundfile = pytest.importorskip("soundfile")
    files = sorted((data_dir / "LibriSpeech").rglob("*.flac"))
    return [soundfile.read(str(file), dtype="float32")[0][:64000] for file in files[:: len(files) // 6][:6]]


@pytest.mark.parametrize("name", ["teacher", "student", "gendistiller", "distilhubert", "wavlm_base"])
def test_states_of_real_speech(name, data_dir):
    """The package's own teacher and student, and random models of full size."""
    if name in ("teacher", "student"):
        from gendistiller_ext import weights
        model = gd.Model.load(weights.wavlm_tiny() if name == "teacher" else weights.student_tiny())
        wavs = speech(data_dir)
    else:
        model, wavs = gd.Model(gd.Config.preset(name), seed=SEED), speech(data_dir)[:2]
    expected, frames = model.forward(wavs)
    for precision in PRECISIONS:
        found = cosines(model.forward(wavs, precision=precision)[0], expected, frames)
        assert found.min() >= COSINE[precision], f"{precision}: {found.round(6)}"
        assert found.max() < 1 - 1e-7, f"{precision}: the states are float32's"


def test_precisions_take_turns():
    """Weights are packed for one precision at a time, and anew when they change."""
    config = CONFIGS["vector_widths"]
    model, wavs = build(config, random_state(config, SEED)), random_wavs([5000, 720], SEED)
    targets = random_targets(config, [5000, 720], SEED)
    assert model.precision == "float32"

    def states(precision):
        return model.forward(wavs, precision=precision)[0]

    first = {precision: states(precision) for precision in (None, *PRECISIONS)}
    loss = model.distill_step(wavs, targets).loss
    for precision in ("int8", None, "bfloat16", "int8"):
        assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(states(precision), first[precision]))
    assert model.distill_step(wavs, targets).loss == loss
    assert not np.array_equal(first["int8"][1], first["bfloat16"][1])
    model.load_params({"encoder.layers.0.fc1.bias": model.params["encoder.layers.0.fc1.bias"] + 1})
    assert not np.array_equal(states("int8")[1], first["int8"][1])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unfinite_weights_show(precision, bad):
    """What float32 would show as NaN or infinity does not become a number."""
    config = CONFIGS["vector_widths"]
    model, wavs = build(config, random_state(config, SEED)), random_wavs([5000], SEED)
    weight = model.params["encoder.layers.0.fc1.weight"].copy()
    weight[3, 5] = bad
    model.load_params({"encoder.layers.0.fc1.weight": weight})
    hidden, _ = model.forward(wavs, precision=precision)
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()


def gradients(model, wavs, targets, **options):
    step = model.distill_step(wavs, targets, **options)
    return step.loss, {name: np.array(grad, np.float64) for name, grad in step.grads.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_in_bfloat16(name):
    """Each tensor's gradient points where float32's does; k_proj.bias has none but rounding. Bits are the same for any
    number of threads, and int8 is refused."""
    config = CONFIGS[name]
    if config.get("architecture") == "encoder":
        pytest.skip("encoders are not trained")
    lengths = [5000, 9000]
    model, wavs = build(config, random_state(config, SEED)), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    loss, exact = gradients(model, wavs, targets)
    rounded_loss, rounded = gradients(model, wavs, targets, precision="bfloat16", num_threads=1)
    assert 0 < abs(rounded_loss - loss) < 0.01 * loss
    whole = np.sqrt(sum((grad**2).sum() for grad in exact.values()))
    for tensor, grad in exact.items():
        other, size = rounded[tensor], np.linalg.norm(grad)
        if size > 1e-4 * whole:
            assert (grad * other).sum() / (size * np.linalg.norm(other)) > 0.99, tensor
    _, again = gradients(model, wavs, targets, precision="bfloat16", num_threads=2)
    assert all(np.array_equal(again[tensor], rounded[tensor]) for tensor in again)
    with pytest.raises(NotImplementedError) as caught:
        model.distill_step(wavs, targets, precision="int8")
    assert str(caught.value) == "precision: training computes in float32 or bfloat16, not in int8"


def test_the_module_has_it_where_no_gradient_is_asked_for(tmp_path):
    torch = pytest.importorskip("torch")
    import pickle

    from gendistiller_ext.torch import GenDistiller

    model = gd.Model(gd.Config(**CONFIGS["vector_widths"]), seed=SEED)
    model.precision = "bfloat16"
    model.save(tmp_path / "m.safetensors")
    wavs = random_wavs([5000], SEED)
    own = {p: model.forward(wavs, precision=p)[0] for p in ("float32", *PRECISIONS)}

    def same(module, precision):
        hidden, _ = module([torch.from_numpy(wav) for wav in wavs])
        return all(np.array_equal(bits(a.detach().numpy()), bits(b))
                   for a, b in zip(hidden, own[precision], strict=True))

    module = GenDistiller(tmp_path / "m.safetensors").eval()
    assert module.precision == "bfloat16" and same(module, "float32")
    with torch.no_grad():
        assert same(module, "bfloat16")
        assert same(GenDistiller(tmp_path / "m.safetensors", precision="int8").eval(), "int8")
        module.precision = "int8"
        assert same(module, "int8") and same(pickle.loads(pickle.dumps(module)), "int8")
    module.requires_grad_(False)
    assert same(module, "int8")
    module.save(tmp_path / "n.safetensors")
    assert gd.Model.load(tmp_path / "n.safetensors").precision == "int8"


def test_the_upstream_has_an_option(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("s3prl")
    from s3prl_upstream.expert import UpstreamExpert

    model = gd.Model(gd.Config(**CONFIGS["vector_widths"]), seed=SEED)
    model.save(tmp_path / "m.safetensors")
    wavs = random_wavs([5000], SEED)
    (tmp_path / "options.yaml").write_text("precision: int8\n")
    upstream = UpstreamExpert(str(tmp_path / "m.safetensors"), str(tmp_path / "options.yaml")).eval()
    with torch.no_grad():
        states = upstream([torch.from_numpy(wavs[0])])["hidden_states"]
    for state, own in zip(states, model.forward(wavs, precision="int8")[0], strict=True):
        assert np.array_equal(bits(state[:, :own.shape[1]].numpy()), bits(own))
