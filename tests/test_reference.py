"""The PyTorch reference against real code: S3PRL's WavLM and distiller, Hugging Face's encoders, torch's
optimiser."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from conftest import SEED, SMALL, SMALL_CONFIGS, SMALL_TEACHERS, SMALL_VARIANTS
from reference import torch_train
from reference.layout import as_config, num_frames, param_shapes, random_state, random_wavs
from reference.peers import (
    HUGGINGFACE,
    cross_attention_of,
    distiller_of,
    huggingface_of,
    s3prl_loss,
    wavlm_of,
    wavlm_states,
)
from reference.torch_model import Reference, relative_buckets

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm"),
    pytest.mark.filterwarnings("ignore:.*mismatched key_padding"),
]

WAV = {"conv_pos": 128, "conv_pos_groups": 3}  # the published kernel on a small width


def audio(length: int = 4000) -> torch.Tensor:
    return torch.tensor(random_wavs([length], SEED)[0])[None]


def run_reference(config, state, wav, dtype=torch.float32, **options):
    with torch.no_grad():
        return Reference(config, state, dtype).forward([w.numpy() for w in wav], **options)[0]


def assert_close(ours, theirs, atol=2e-5):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert a.shape == b.shape
        assert (a - b).abs().max() < atol, f"state {i}: {(a - b).abs().max():.2e}"
        assert b.abs().mean() > 0.1


@pytest.mark.parametrize(
    "preset,changes,count",
    [
        ("gendistiller", {}, 17_589_908),
        (
            "gendistiller_plain",
            {"relative_position_embedding": False, "gru_rel_pos": False, "feature_layer_norm": False},
            17_584_512,
        ),
        ("table3_3layers", {"architecture": "self_hidden", "encoder_layers": 3}, 30_585_532),
        ("table3_1layer", {"skip_connection": False, "output_layer": False}, 16_408_724),
        (
            "table3_cross_attention",
            {"skip_connection": False, "output_layer": False, "cross_attention": True},
            18_772_628,
        ),
        ("table4_ffn1536", {"encoder_ffn_embed_dim": 1536}, 15_229_076),
        (
            "distilhubert",
            {
                "architecture": "multi_head",
                "encoder_layers": 2,
                "target_layers": (4, 8, 12),
                "relative_position_embedding": False,
                "feature_layer_norm": False,
            },
            27_034_752,
        ),
        ("wavlm_base", {"architecture": "encoder", "encoder_layers": 12}, 94_381_168),
    ],
)
def test_parameter_counts(preset, changes, count):
    assert sum(math.prod(shape) for shape in param_shapes(changes).values()) == count


@pytest.mark.parametrize("name", ["small", "odd_widths", "layer_norm_extractor", "vector_widths"])
def test_random_weights_give_unit_scale(name):
    config = SMALL_CONFIGS[name]
    for h in run_reference(config, random_state(config, SEED), audio(16000)):
        assert 0.4 < h.square().mean().sqrt() < 2.5


@pytest.mark.parametrize("name", ["wavlm", "hubert", "wavlm_large"])
@pytest.mark.parametrize("length", [400, 4000, 16000 * 6])
def test_s3prl_wavlm(name, length):
    """6 s: 299 frames, so that distances pass 80 and buckets are logarithmic."""
    config = {**SMALL_TEACHERS[name], **WAV}
    state, wav = random_state(config, SEED), audio(length)
    source = F.layer_norm(wav, wav.shape[1:]) if as_config(config).normalize else wav
    assert_close(run_reference(config, state, wav), wavlm_states(wavlm_of(config, state), source))


def test_s3prl_wavlm_padded_batch():
    """`padding: s3prl` is what S3PRL's padded batch gives, in the padded frames too; `exact` is not."""
    config = {**SMALL_TEACHERS["wavlm"], **WAV, "padding": "s3prl"}
    state, wavs = random_state(config, SEED), random_wavs([7000, 3100, 5555], SEED)
    padded = torch.stack([F.pad(torch.tensor(w), (0, 7000 - len(w))) for w in wavs])
    mask = torch.arange(7000)[None] >= torch.tensor([[len(w)] for w in wavs])
    theirs = wavlm_states(wavlm_of(config, state), padded, mask)
    with torch.no_grad():
        ours, frames = Reference(config, state).forward(wavs)
        exact, exact_frames = Reference({**config, "padding": "exact"}, state).forward(wavs)
    assert_close(ours, theirs)
    assert (ours[1][1, :9] - exact[1][1, :9]).abs().max() > 0.01
    assert all(abs(exact_frames - frames) <= 1) and not exact[1][1, exact_frames[1] :].any()


@pytest.mark.parametrize("num_buckets,max_distance", [(320, 800), (32, 128), (12, 20)])
def test_s3prl_buckets(num_buckets, max_distance):
    modules = pytest.importorskip("s3prl.upstream.wavlm.modules")
    attention = modules.MultiheadAttention(
        8,
        2,
        self_attention=True,
        has_relative_attention_bias=True,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    offset = torch.arange(1600)[None] - torch.arange(1600)[:, None]
    assert torch.equal(
        relative_buckets(1600, num_buckets, max_distance), attention._relative_positions_bucket(offset)
    )


@pytest.mark.parametrize("kind,name", HUGGINGFACE)
def test_huggingface(kind, name):
    config = {**SMALL_TEACHERS[name], **WAV}
    state, wav = random_state(config, SEED), audio(32000)
    source = F.layer_norm(wav, wav.shape[1:]) if as_config(config).normalize else wav
    with torch.no_grad():
        theirs = huggingface_of(kind, config, state)(source, output_hidden_states=True).hidden_states
    assert_close(run_reference(config, state, wav), theirs)


@pytest.mark.parametrize("task,name", [("expand-last", "multi_head"), ("self-hidden", "self_hidden")])
@pytest.mark.parametrize("mode", ["default", "layer_norm"])
def test_s3prl_distiller(task, name, mode):
    config = {
        **SMALL_VARIANTS[name],
        **WAV,
        "relative_position_embedding": False,
        "gru_rel_pos": False,
        "feature_layer_norm": False,
        "extractor_mode": mode,
        "padding": "s3prl",
    }
    state, wavs = random_state(config, SEED), random_wavs([7000, 3100], SEED)
    model = distiller_of(config, state, task)
    padded = torch.stack([F.pad(torch.tensor(w), (0, 7000 - len(w))) for w in wavs])
    mask = (torch.arange(7000)[None] < torch.tensor([[len(w)] for w in wavs])).float()
    with torch.no_grad():
        _, f, pred, pad_mask, hidden = model(padded, mask, get_hidden=True)
        ours, frames = Reference(config, state).forward(wavs)
    theirs = [f, *hidden, *pred.unbind(1)] if task == "expand-last" else list(pred.unbind(1))
    assert list(pad_mask.sum(1).int()) == list(frames)
    assert_close(ours, theirs)


@pytest.mark.parametrize("feat_pen_loss", [0.0, 5.0])
def test_s3prl_distiller_gradients(feat_pen_loss):
    """feature_grad_mult as S3PRL's GradMultiply, and every gradient of a distillation step."""
    config = {**SMALL_VARIANTS["multi_head"], **WAV, "feature_grad_mult": 0.1}
    state, wav = random_state(config, SEED), audio(6000)
    model = distiller_of(config, state, "expand-last")
    target = torch.randn((3, 1, num_frames(config, 6000), 12), generator=torch.Generator().manual_seed(SEED))
    feat, _, pred, _ = model(wav, torch.ones_like(wav))
    loss = s3prl_loss(pred, target.transpose(0, 1), feat=feat, feat_pen_loss=feat_pen_loss)
    loss.backward()
    ours = torch_train.distill_step(config, state, [wav[0].numpy()], target.numpy(), feat_pen_loss=feat_pen_loss)
    assert abs(ours.loss - loss.item()) < 1e-6
    for name, p in model.named_parameters():
        scale = p.grad.norm().item() + 1e-4
        assert np.linalg.norm(ours.grads[name] - p.grad.numpy()) < 1e-4 * scale, name


@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3])
def test_loss_is_s3prls(lam):
    generator = torch.Generator().manual_seed(SEED)
    pred, target = torch.randn((2, 3, 4, 17, 9), generator=generator)
    pred.requires_grad_()
    theirs = s3prl_loss(pred, target, lam)
    ours = torch_train.distill_loss(pred, target, [17, 3, 9, 1], lam, mask_padding=False)
    assert abs(ours.loss - theirs) < 1e-6
    grads = [torch.autograd.grad(x, pred)[0] for x in (ours.loss, theirs)]
    assert torch.allclose(*grads, atol=1e-9)
    masked = torch_train.distill_loss(pred, target, [17, 3, 9, 1], lam)
    alone = [s3prl_loss(pred[:, b, :n], target[:, b, :n], lam) * n for b, n in enumerate([17, 3, 9, 1])]
    assert abs(masked.loss - sum(alone) / 30) < 1e-6
    summed = torch_train.distill_loss(pred, target, [17, 3, 9, 1], lam, "sum")
    assert abs(summed.loss - sum(alone)) < 1e-4


def test_adamw_is_torchs():
    """With clipping, against torch.optim.AdamW and clip_grad_norm_, ten steps."""
    rng = np.random.default_rng(SEED)
    params = {"a.weight": rng.standard_normal((5, 7)), "a.bias": rng.standard_normal(5)}
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    groups = [
        {"params": [theirs["a.weight"]], "weight_decay": 0.1},
        {"params": [theirs["a.bias"]], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    ours = torch_train.AdamW(params, lr=1e-2, weight_decay=0.1, clip=5.0)
    for step in range(10):
        for name, p in theirs.items():
            p.grad = torch.tensor(rng.standard_normal(p.shape) * (0.1 if step % 2 else 3.0))
        grads = {name: p.grad.numpy().copy() for name, p in theirs.items()}
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 5.0)
        assert abs(ours.step(grads) - norm.item()) < 1e-12
        peer.step()
    for name, p in theirs.items():
        assert torch.allclose(ours.params[name], p.detach(), atol=1e-13, rtol=0)


def test_schedule_rises_and_falls():
    assert [round(torch_train.schedule(t, 1000), 6) for t in (7, 35, 70, 535, 1000)] == [
        0.1,
        0.5,
        1.0,
        0.5,
        0.0,
    ]


def test_shared_teacher(teacher_path):
    """Every state of the shared teacher, through S3PRL's own WavLM."""
    wavlm = pytest.importorskip("s3prl.upstream.wavlm.WavLM")
    file = torch.load(teacher_path, weights_only=True)
    model = wavlm.WavLM(wavlm.WavLMConfig(file["cfg"])).eval()
    model.load_state_dict(file["model"])
    known = vars(as_config({}))
    config = {name: value for name, value in file["cfg"].items() if name in known} | {
        "architecture": "encoder"
    }
    config["conv_feature_layers"] = tuple(
        (c.out_channels, c.kernel_size[0], c.stride[0])
        for c in (layer[0] for layer in model.feature_extractor.conv_layers)
    )
    state = {name: value.numpy() for name, value in file["model"].items() if name != "mask_emb"}
    assert {name: value.shape for name, value in state.items()} == param_shapes(config)
    assert_close(run_reference(config, state, audio(24000)), wavlm_states(model, audio(24000)), 1e-4)


@pytest.mark.parametrize(
    "name", ["small", "cross_attention", "neither", "skip_only", "output_only", "every_step"]
)
def test_generation_by_wavlms_own_block(name):
    """Equation 1 spelt out with S3PRL's block as F: h[0] is the block's input, O two linears."""
    config = {**SMALL_CONFIGS, **SMALL_VARIANTS}[name]
    config = {**config, **WAV, "target_layers": (4, 8, 12)}
    c, state, wav = as_config(config), random_state(config, SEED), audio(30000)
    own = {k: v for k, v in state.items() if not k.startswith("output_layer") and "cross_attn" not in k}
    model = wavlm_of({**config, "architecture": "encoder", "cross_attention": False}, own)
    embedding = []
    model.encoder.register_forward_pre_hook(lambda m, i: embedding.append(i[0].clone()))
    h = wavlm_states(model, wav)[0]
    f, encoder = embedding[0], model.encoder
    block = encoder.layers[0]
    weights = {k: torch.tensor(v) for k, v in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    expected = [f]
    with torch.no_grad():
        for step in range(3):
            if c.position == "every_step" and step:
                h = encoder.layer_norm(h + encoder.pos_conv(h.transpose(1, 2)).transpose(1, 2))
            if c.cross_attention:
                t = h.transpose(0, 1)
                x = block.self_attn_layer_norm(t + block.self_attn(t, t, t)[0]).transpose(0, 1)
                cross = cross_attention_of(state, c.encoder_embed_dim, c.encoder_attention_heads)
                x = norm(x + cross(x, f, f)[0], "encoder.layers.0.cross_attn_layer_norm")
                z = block.final_layer_norm(x + block.fc2(F.gelu(block.fc1(x))))
            else:
                z = block(h.transpose(0, 1))[0].transpose(0, 1)
            z = z + h if c.skip_connection else z
            if c.output_layer:
                inner = F.gelu(F.linear(z, weights["output_layer.0.weight"], weights["output_layer.0.bias"]))
                z = F.linear(inner, weights["output_layer.2.weight"], weights["output_layer.2.bias"])
            h = z
            expected.append(h)
    assert_close(run_reference(config, state, wav), expected, 3e-5)


def test_free_history_is_generation_and_teacher_history_is_not():
    """Feeding a step what the free run generated changes nothing; anything else does."""
    config = {**SMALL, "target_layers": (4, 8, 12)}
    state, wav = random_state(config, SEED), audio(5000)
    free = run_reference(config, state, wav)
    assert_close(run_reference(config, state, wav, history=torch.stack(free[1:])), free, 1e-6)
    other = run_reference(config, state, wav, history=torch.stack(free[1:]) + 0.5)
    assert (other[1] - free[1]).abs().max() == 0 and (other[2] - free[2]).abs().max() > 0.05
    assert len(run_reference(config, state, wav, num_layers=5)) == 6


@pytest.mark.parametrize("name", [*SMALL_VARIANTS, "extractor_frozen"])
def test_gradients_by_central_differences(name):
    """Autograd of every configuration's loss against differences along random directions: what flows where
    (every step's history, the frozen extractor) is autograd's own answer, not an accident of a detach."""
    config = {**SMALL_CONFIGS, **SMALL_VARIANTS}[name]
    c, state, wavs = as_config(config), random_state(config, SEED), random_wavs([1500, 2300], SEED)
    rng = np.random.default_rng(SEED)
    targets = rng.standard_normal((len(c.target_layers), 2, num_frames(config, 2300), c.encoder_embed_dim))
    grads = torch_train.distill_step(config, state, wavs, targets, feat_pen_loss=2.0).grads
    moving = {n for n in state if not (name == "extractor_frozen" and n.startswith("feature_extractor"))}
    direction = {n: rng.standard_normal(v.shape) * (n in moving) for n, v in state.items()}
    loss = [
        torch_train.distill_step(
            config, {n: v + e * direction[n] for n, v in state.items()}, wavs, targets, feat_pen_loss=2.0
        ).loss
        for e in (1e-6, -1e-6)
    ]
    expected = sum((grads[n] * direction[n]).sum() for n in state)
    assert abs((loss[0] - loss[1]) / 2e-6 - expected) < 1e-5 * max(1, abs(expected))
    assert all(grads[n].any() == (n in moving) for n in state if "k_proj.bias" not in n)
