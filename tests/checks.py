"""What tests of several files assert of the engine's results."""

from __future__ import annotations

import numpy as np

from reference.layout import num_frames


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


def assert_rows_alone(batch, alone, lengths, config):
    hidden, frames = batch
    total = num_frames(config, max(lengths))
    assert list(frames) == [num_frames(config, n) for n in lengths]
    for s, h in enumerate(hidden):
        assert h.shape[:2] == (len(lengths), total)
        for b, (own, _) in enumerate(alone):
            assert np.array_equal(bits(h[b, : frames[b]]), bits(own[s][0])), f"state {s}, utterance {b}"
            assert not h[b, frames[b] :].any(), f"state {s}, utterance {b}: padding is not zero"


def assert_gradients(ours, expected, relative=1e-3, floor=2e-7):
    """|d| <= relative |ref| + floor |whole gradient| for each tensor, in norm. A key's bias has no gradient
    (the softmax ignores it), so its own is rounding: a few times the floor."""
    assert set(ours) == set(expected)
    whole = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in expected.values()))
    wrong = []
    for name, reference in expected.items():
        assert ours[name].shape == reference.shape and ours[name].dtype == np.float32
        bound = relative * np.linalg.norm(reference) + floor * whole * (
            10 if name.endswith("k_proj.bias") else 1
        )
        error = np.linalg.norm(ours[name] - reference)
        if not error <= bound:
            wrong.append(f"{name}: |d| {error:.2e} > {bound:.2e}, |ref| {np.linalg.norm(reference):.2e}")
    assert not wrong, f"whole gradient {whole:.2e}\n" + "\n".join(wrong)
