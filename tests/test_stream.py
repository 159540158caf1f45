"""Windows of long audio: statistics in pieces, chunks against one pass, streams fed in any pieces."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import gendistiller_ext as gd
from checks import bits
from conftest import SEED, SMALL, SMALL_CONFIGS, SMALL_TEACHERS, SMALL_VARIANTS
from engine import build
from gendistiller_ext.stream import Stream, chunks, statistics
from reference.layout import random_state, random_wavs

CONFIGS = {name: {**SMALL_CONFIGS, **SMALL_TEACHERS, **SMALL_VARIANTS}[name] for name in (
    "small", "vector_widths", "normalize", "layer_norm_extractor", "one_conv", "wavlm", "wavlm_large", "multi_head",
    "cross_attention", "every_step")}
SAMPLES = 50123  # 156 frames
#: The promises of bits hold in every precision; "vector_widths" has convolutions that are filtered in bfloat16.
IN_PRECISIONS = [(name, "float32") for name in CONFIGS] + [
    (name, precision) for name in ("vector_widths", "wavlm_large", "multi_head") for precision in ("bfloat16", "int8")]


def model_of(name: str) -> gd.Model:
    return build(CONFIGS[name], random_state(CONFIGS[name], SEED))


def audio(samples: int = SAMPLES, seed: int = SEED) -> np.ndarray:
    """Noise that gets louder and has an offset, so that its statistics change over time."""
    wav = random_wavs([samples], seed)[0]
    return (wav * np.linspace(0.2, 1.5, samples) + 0.1).astype(np.float32)


def cut(wav: np.ndarray, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, 3, 9, 320, 1000, 7777], size=4 * len(wav))
    places = np.cumsum(lengths)
    return np.split(wav, places[places < len(wav)])


def joined(parts) -> list[np.ndarray]:
    return [np.concatenate(states) for states in zip(*parts)]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(bits(x), bits(y)) for x, y in zip(a, b))


# ---- Statistics --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["small", "one_conv"])
def test_statistics_are_those_of_the_frames(name):
    """Against NumPy, added in blocks that no frame of conv 0 respects."""
    model, wav = model_of(name), audio()
    _, kernel, stride = model.config.conv_feature_layers[0]
    given, at = None, 0
    for size in (5, 1, 3, 40, 12345, 20000, SAMPLES):
        before = min(at, kernel - 1)
        given = model._add_statistics(given, wav[at - before:at + size], before)
        at = min(at + size, SAMPLES)
    frames = np.lib.stride_tricks.sliding_window_view(wav.astype(np.float64), kernel)[::stride]
    assert given[0] == SAMPLES
    np.testing.assert_allclose(given[1:3], (wav.mean(dtype=float), wav.var(dtype=float)), rtol=1e-12)
    np.testing.assert_allclose(given[3:3 + kernel], frames.mean(0), rtol=1e-12)
    np.testing.assert_allclose(given[3 + kernel:].reshape(kernel, kernel), np.cov(frames.T, bias=True),
                               rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_of_the_utterance_change_nothing(name):
    """Given its own statistics an utterance has the states that it has without: the same bits, but that
    `normalize` sums its samples in another order."""
    model, wav = model_of(name), audio()
    plain, _ = model.forward([wav])
    given, _ = model.forward([wav], statistics=statistics(model, [wav])[None])
    if model.config.normalize:
        for a, b in zip(plain, given, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * np.abs(a).max())
        np.testing.assert_allclose(plain[0], given[0], rtol=0, atol=1e-5 * np.abs(plain[0]).max())
    else:
        assert equal(plain, given)


def test_statistics_in_blocks_give_the_same_fold():
    """More than one block of a minute."""
    model, wav = model_of("small"), audio(16000 * 130)
    blocks, whole = statistics(model, cut(wav, 1)), model._add_statistics(None, wav, 0)
    np.testing.assert_allclose(blocks, whole, rtol=1e-10, atol=1e-13)
    assert np.array_equal(blocks, statistics(model, [wav]))


def test_silence():
    """No variance: rounding must not make one that is refused."""
    model = model_of("normalize")
    for level in (0.0, 0.3):
        stream = model.stream(0.4, 0.2)
        silence = np.full(20000, level, np.float32)
        states = joined([stream.feed(silence), stream.finish()])
        assert all(np.isfinite(state).all() for state in states)


# ---- Windows against one pass ------------------------------------------------------------------------------

@pytest.mark.parametrize("name, precision", IN_PRECISIONS)
@pytest.mark.parametrize("chunk, context", [(0.4, 0), (0.32, 0.16), (0.5, 1.0)])
def test_the_extractor_is_exact(name, precision, chunk, context):
    """The feature embedding of each chunk is that of one pass, whatever the window: bit for bit, or to the
    rounding of `normalize`. Encoders have none among their states."""
    model, wav = model_of(name), audio()
    if model.config.architecture == "encoder":
        pytest.skip("an encoder's states begin after the positional convolution")
    given = statistics(model, [wav])
    f = joined(chunks(model, [wav], chunk, context, stats="fixed", statistics=given, precision=precision))[0]
    whole = model.forward([wav], statistics=given[None], precision=precision)[0][0][0]
    assert np.array_equal(f, whole)


@pytest.mark.parametrize("name, precision", IN_PRECISIONS)
def test_a_context_that_reaches_everything_is_one_pass(name, precision):
    model, wav = model_of(name), audio()
    given = statistics(model, [wav])
    assert equal(joined(chunks(model, [wav], 0.3, 60, stats="fixed", statistics=given, precision=precision)),
                 [state[0] for state in model.forward([wav], statistics=given[None], precision=precision)[0]])


def test_more_context_is_closer_to_one_pass(data_dir):
    """On speech, with the student of the package: a minute in chunks of four seconds."""
    soundfile = pytest.importorskip("soundfile")
    from gendistiller_ext.weights import student_tiny
    model = gd.Model.load(student_tiny())
    wavs, samples = [], 0
    for path in sorted(data_dir.rglob("*.flac")):
        wavs.append(soundfile.read(str(path), dtype="float32")[0])
        samples += len(wavs[-1])
        if samples > 16000 * 60:
            break
    wav = np.concatenate(wavs)
    whole = model.forward([wav])[0]
    given = statistics(model, [wav])
    distances = []
    for context in (0, 2, 10):
        states = joined(chunks(model, [wav], 4, context, stats="fixed", statistics=given))
        assert np.abs(states[0] - whole[0][0]).max() <= 1e-6 * np.abs(whole[0]).max()
        distances.append([np.linalg.norm(a - b[0]) / np.linalg.norm(b) for a, b in zip(states[1:], whole[1:])])
    assert (np.diff(distances, axis=0) < 0).all(), distances
    assert np.max(distances[-1]) < 0.15, distances


# ---- Streams -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stats", ["running", "fixed"])
@pytest.mark.parametrize("name, precision", [
    *((name, "float32") for name in ("small", "vector_widths", "normalize", "wavlm_large")),
    ("vector_widths", "bfloat16"), ("vector_widths", "int8")])
def test_pieces_do_not_matter(name, precision, stats):
    model, wav = model_of(name), audio()
    options = {"precision": precision}
    if stats == "fixed":
        options["statistics"] = statistics(model, [audio(20000, 5)])
    results = []
    for pieces in ([wav], cut(wav, 1), cut(wav, 2)):
        stream = model.stream(0.4, 0.2, stats, **options)
        parts = [stream.feed(piece) for piece in pieces]
        model.forward([wav[:3000]])  # the model is used elsewhere meanwhile
        results.append(joined(parts + [stream.finish()]))
        assert stream.frames == len(results[-1][0]) == gd.num_frames(model.config, SAMPLES)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_stream_is_the_chunks(precision):
    model, wav = model_of("vector_widths"), audio()
    options = {"stats": "fixed", "statistics": statistics(model, [wav]), "precision": precision}
    stream = Stream(model, 0.4, 0.2, **options)
    parts = [stream.feed(piece) for piece in cut(wav, 3)] + [stream.finish()]
    states = joined(parts)
    assert equal(states, joined(chunks(model, [wav], 0.4, 0.2, **options)))
    other = chunks(model, [wav], 0.4, 0.2, **{**options, "precision": "float32"})
    assert (precision == "float32") == equal(states, joined(other))


@pytest.mark.parametrize("samples", [400, 719, 720, 6400, 6719, 6720, 6800, 25600, 25999])
def test_lengths_at_the_borders_of_chunks(samples):
    model, wav = model_of("small"), audio(samples)
    given = statistics(model, [wav])
    for context in (0, 0.16, 3):
        states = joined(chunks(model, cut(wav, 4), 0.4, context, stats="fixed", statistics=given))
        assert np.array_equal(states[0], model.forward([wav])[0][0][0])


def test_running_statistics_hear_what_came():
    """Each chunk's embedding is that of all audio heard until then, of which a window has but a part: what comes
    later doesn't change it."""
    model, wav = model_of("small"), audio()
    stream = model.stream(0.4, 0.2)
    heard = round(stream.latency_seconds * 16000)
    assert not len(stream.feed(wav[:heard - 1])[0])
    first = stream.feed(wav[heard - 1:heard])
    assert equal(first, [state[0, :20] for state in model.forward([wav[:heard]])[0]])
    for frame in (20, 40, 60):
        heard += 20 * 320
        embedding = stream.feed(wav[heard - 20 * 320:heard])[0]
        whole = model.forward([wav[:heard]])[0][0][0, frame:frame + 20]
        assert np.abs(embedding - whole).max() < 1e-5 * np.abs(whole).max()


def test_seconds_are_rounded_up_to_four_frames():
    stream = model_of("small").stream(0.5, 0.01)
    assert (stream.chunk_seconds, stream.context_seconds) == (0.56, 0.08)
    assert stream.latency_seconds == (32 * 320 + 399) / 16000


def test_fixed_statistics_go_with_the_model(tmp_path):
    model, wav = model_of("small"), audio()
    given = statistics(model, [wav])
    model.statistics = given
    model.save(tmp_path / "a.safetensors")
    for other in (gd.Model.load(tmp_path / "a.safetensors"), copy.deepcopy(model)):
        assert np.array_equal(other.statistics, given)
        stream = other.stream(0.4, 0.2, "fixed")
        assert equal(joined([stream.feed(wav), stream.finish()]),
                     joined(chunks(model, [wav], 0.4, 0.2, stats="fixed", statistics=given)))
    model.statistics = None
    model.save(tmp_path / "b.safetensors")
    assert gd.Model.load(tmp_path / "b.safetensors").statistics is None


# ---- Wrong arguments ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, kind, message", [
    ((0, 1), ValueError, "chunk_seconds: expected more than 0 seconds, got 0"),
    ((float("nan"), 1), ValueError, "chunk_seconds: expected more than 0 seconds, got nan"),
    (("1", 1), TypeError, "chunk_seconds: expected a number, got str"),
    ((1, -1), ValueError, "context_seconds: expected 0 or more seconds, got -1"),
    ((1, float("inf")), ValueError, "context_seconds: expected 0 or more seconds, got inf"),
    ((1, 1, "slow"), ValueError, "stats: expected 'running' or 'fixed', got 'slow'"),
    ((1, 1, "fixed"), ValueError, r"statistics: expected some with stats 'fixed', .*--fix-stats"),
])
def test_wrong_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        model_of("small").stream(*arguments)


def test_wrong_options():
    model = model_of("small")
    size = len(statistics(model, [audio()]))
    with pytest.raises(ValueError, match="statistics: expected none with stats 'running'"):
        model.stream(1, 1, statistics=np.zeros(size))
    with pytest.raises(ValueError, match=r"statistics: expected float64 \(1, 113\), got float64 \(1, 7\)"):
        model.stream(1, 1, "fixed", statistics=np.zeros(7))
    with pytest.raises(ValueError, match="statistics: expected those of at least 10 samples of audio"):
        model.stream(1, 1, "fixed", statistics=np.zeros(size))
    with pytest.raises(ValueError, match="num_layers: expected 1 to 64"):
        model.stream(1, 1, num_layers=99)
    with pytest.raises(ValueError, match="padding: expected a model with 'exact', got 's3prl'"):
        build(SMALL_CONFIGS["padded_as_s3prl"], random_state(SMALL, SEED)).stream(1, 1)


@pytest.mark.parametrize("samples, kind, message", [
    ([0.0], TypeError, r"samples: expected float32 \(samples,\), got list"),
    (np.zeros(3), ValueError, r"samples: expected float32 \(samples,\), got float64 \(3,\)"),
    (np.zeros((1, 3), np.float32), ValueError, r"samples: expected float32 \(samples,\), got float32 \(1, 3\)"),
    (np.full(3, np.nan, np.float32), ValueError, "samples: expected finite samples, got NaN or infinity"),
])
def test_wrong_samples_change_nothing(samples, kind, message):
    model, wav = model_of("small"), audio()
    stream, other = model.stream(0.4, 0.2), model.stream(0.4, 0.2)
    parts = [stream.feed(wav[:9000])]
    with pytest.raises(kind, match=message):
        stream.feed(samples)
    parts += [stream.feed(wav[9000:]), stream.finish()]
    assert equal(joined(parts), joined([other.feed(wav), other.finish()]))


def test_the_end():
    stream = model_of("small").stream(0.4, 0.2)
    stream.feed(np.zeros(399, np.float32))
    with pytest.raises(ValueError, match="samples: expected at least 400 in all, got 399"):
        stream.finish()
    stream.feed(np.zeros(1, np.float32))
    assert len(stream.finish()[0]) == 1 and len(stream.finish()[0]) == 0
    with pytest.raises(ValueError, match=r"samples: expected none after finish\(\)"):
        stream.feed(np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="pieces: expected at least 400 samples in all, got 0"):
        statistics(model_of("small"), [])


@pytest.mark.parametrize("value, kind, message", [
    (1, ValueError, r"statistics: expected float64 \(113,\), got int64 \(\)"),
    (np.zeros(113), ValueError, "statistics: expected those of at least 10 samples of audio"),
    (np.full(113, np.nan), ValueError, "statistics: expected those of at least 10 samples of audio"),
    (np.zeros(113, np.float32), ValueError, r"statistics: expected float64 \(113,\), got float32 \(113,\)"),
])
def test_wrong_statistics_are_not_kept(value, kind, message):
    model = model_of("small")
    model.statistics = given = statistics(model, [audio()])
    with pytest.raises(kind, match=message):
        model.statistics = value
    assert np.array_equal(model.statistics, given)


def test_no_entry_of_statistics_may_be_infinite():
    model = model_of("small")
    given = statistics(model, [audio()])
    for place in (0, 1, 4, len(given) - 1):
        wrong = given.copy()
        wrong[place] = np.inf
        with pytest.raises(ValueError, match="statistics: expected those of at least 10 samples of audio"):
            model.statistics = wrong


def test_each_utterance_has_its_row_of_statistics():
    model, wavs = model_of("small"), [audio(), audio()[:9000] * 3]
    given = np.stack([statistics(model, [wav]) for wav in wavs])[::-1]  # of the other one, so that they matter
    together, frames = model.forward(wavs, statistics=given)
    for b, wav in enumerate(wavs):
        alone, _ = model.forward([wav], statistics=given[b:b + 1])
        assert equal([state[b, :frames[b]] for state in together], [state[0] for state in alone])


def test_wrong_arguments_of_add_statistics():
    model, wav = model_of("small"), audio()
    given = model._add_statistics(None, wav[:100], 0)
    with pytest.raises(ValueError, match="before: expected 9 to 50, got 8"):
        model._add_statistics(given, wav[:50], 8)
    with pytest.raises(ValueError, match="audio: expected at least one sample, got 0"):
        model._add_statistics(given, wav[:50], 50)
    for place in (0, 1):
        with pytest.raises(ValueError, match=f"audio: expected finite samples, got infinity at sample {place}"):
            model._add_statistics(None, np.where(np.arange(2) == place, np.inf, 0).astype(np.float32), 0)
    for heard in (-1.0, np.nan, 1e300):
        given[0] = heard
        with pytest.raises(ValueError, match=r"statistics: expected those of at most 2\^53 samples"):
            model._add_statistics(given, wav, 9)
