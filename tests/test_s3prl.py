"""The upstream inside S3PRL: its acceptance checks, its featurizers, batches against single clips, bit for
bit."""

from __future__ import annotations

import hashlib
import http.server
import math
import threading
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("s3prl", reason="S3PRL is not installed")

import s3prl_upstream

s3prl_upstream.register()

from s3prl import hub
from s3prl.nn import Featurizer, S3PRLUpstream
from s3prl.upstream import interfaces

import gendistiller_ext as gd
from conftest import SEED, SMALL, SMALL_TEACHERS, SMALL_VARIANTS
from reference.layout import random_state, random_wavs
from s3prl_upstream import download
from s3prl_upstream.cache import StateCache

# A row of n samples has T = (n - 80) // 320 frames, S3PRL asks for round(n / 320) or ceil(n / 320): every
# case of both.
LENGTHS = [5121, 400, 799, 800, 801, 960, 3359, 3360, 3361, 5119, 5120, 2480, 2479]
SHORT = [1, 159, 160, 161, 320, 321, 399]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return str(checkpoint(tmp_path_factory.mktemp("student") / "student.safetensors", SMALL))


def checkpoint(path, fields):
    config = gd.Config(**fields)
    model = gd.Model(config)
    model.load_params(random_state(config, SEED))
    model.save(path)
    return path


def wavs_of(lengths, seed=SEED):
    return [torch.from_numpy(wav) for wav in random_wavs(lengths, seed)]


def padded(wavs):
    return torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), torch.tensor([len(wav) for wav in wavs])


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


# ---- S3PRL's acceptance checks -----------------------------------------------------------------------------


def features(model, seed, low=1.0, high=3.0, count=2):
    """All states of `count` noises of `low` to `high` seconds that want a gradient, as S3PRL's checks make
    them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(round(16000 * low), round(16000 * high) + 1, (count,), generator=generator)
    wavs = [torch.randn(length, generator=generator).requires_grad_() for length in lengths.tolist()]
    states, frames = model(*padded(wavs))
    for state, count_ in zip(states, frames):
        assert state.dtype == torch.float32 and state.shape[:2] == (count, math.ceil(int(max(lengths)) / 320))
        assert count_.tolist() == [math.ceil(length / 320) for length in lengths.tolist()]
    return states


def test_same_states_every_time(ckpt):
    model = S3PRLUpstream("gendistiller", ckpt).eval()
    with torch.no_grad():
        first = features(model, 0)
        assert all(same(features(model, 0), first) for _ in range(2))
        assert not same(features(model, 1), first)
    model.train()
    assert {len(features(model, seed)) for seed in range(5)} == {len(first)} == {model.num_layers} == {3}


@pytest.mark.parametrize("low,high,count", [(0.05, 0.05, 1), (0.05, 0.05, 2), (0.05, 1.0, 3)])
def test_forward_and_backward(ckpt, low, high, count):
    with torch.autograd.set_detect_anomaly(True):
        model = S3PRLUpstream("gendistiller", ckpt)
        sum(state.sum() for state in features(model, 0, low, high, count)).backward()
    grads = [param.grad for param in model.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    assert sum(grad.abs().sum() for grad in grads) > 0


def test_properties(ckpt):
    model = S3PRLUpstream("gendistiller", ckpt)
    assert (model.num_layers, model.downsample_rates, model.hidden_sizes) == (3, [320] * 3, [12] * 3)
    featurizer = Featurizer(model)
    assert (featurizer.output_size, featurizer.downsample_rate) == (12, 320)
    assert set(S3PRLUpstream.available_names()) >= {"gendistiller", "gendistiller_local", "gendistiller_url"}
    registered = S3PRLUpstream.available_names(only_registered_ckpt=True)
    assert [name for name in registered if "gendistiller" in name] == ["gendistiller"]


# ---- The dict ----------------------------------------------------------------------------------------------


def test_states_are_the_models(ckpt):
    wavs = wavs_of(LENGTHS)
    out = hub.gendistiller(ckpt=ckpt, model_config=None, refresh=False).eval()(wavs)
    hidden, frames = gd.Model.load(ckpt).forward([wav.numpy() for wav in wavs])
    assert len(out["hidden_states"]) == len(hidden) == 3
    assert out["last_hidden_state"] is out["paper"] is out["hidden_states"][-1]
    width = math.ceil(max(LENGTHS) / 320)
    for ours, model in zip(out["hidden_states"], hidden):
        assert ours.shape == (len(LENGTHS), width, 12)
        for row, expected, count, length in zip(ours.detach().numpy(), model, frames, LENGTHS):
            wanted = math.ceil(length / 320)
            np.testing.assert_array_equal(row[:count], expected[:count])
            repeated = np.repeat(expected[count - 1:count], wanted - count, 0)
            np.testing.assert_array_equal(row[count:wanted], repeated)
            assert not row[wanted:].any()
    assert out["pad_mask"].dtype == torch.float32
    assert out["pad_mask"].tolist() == [[float(t < count) for t in range(width)] for count in frames]


def test_short_clips_are_padded_to_one_frame(ckpt):
    upstream = hub.gendistiller(ckpt=ckpt).eval()
    for length in SHORT:
        wav = wavs_of([400], length)[0][:length]
        whole = torch.cat((wav, torch.zeros(400 - length)))
        ours, full = (upstream([given]) for given in (wav, whole))
        first = [[state[:, :1] for state in out["hidden_states"]] for out in (ours, full)]
        assert same(*first) and ours["pad_mask"].sum() == 1


def test_paper_is_the_last_block_of_parallel_heads(tmp_path):
    try:
        path = checkpoint(tmp_path / "m.safetensors", SMALL_VARIANTS["multi_head"])
        upstream = hub.gendistiller(ckpt=str(path))
    except NotImplementedError as error:
        pytest.skip(str(error))
    out = upstream.eval()(wavs_of([4000]))
    assert len(out["hidden_states"]) == 6 and out["paper"] is out["hidden_states"][2]
    assert out["last_hidden_state"] is out["hidden_states"][5]


def test_teachers_are_upstreams_too(tmp_path):
    path = str(checkpoint(tmp_path / "teacher.safetensors", SMALL_TEACHERS["wavlm"]))
    with torch.no_grad():
        out = hub.gendistiller(ckpt=path).eval()(wavs_of([4000]))
        assert len(out["hidden_states"]) == 4
        assert len(hub.gendistiller(ckpt=path, num_layers=2).eval()(wavs_of([4000]))["hidden_states"]) == 3


# ---- Batched as alone, through S3PRL -----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("selection", ["hidden_states", "last_hidden_state", "paper"])
def test_batched_as_alone_through_the_featurizer(ckpt, selection, threads):
    upstream = hub.gendistiller(ckpt=ckpt, num_threads=threads).eval()
    alone = hub.gendistiller(ckpt=ckpt, num_threads=1).eval()
    featurizer = interfaces.Featurizer(upstream, selection, upstream_device="cpu")
    with torch.no_grad():
        if selection == "hidden_states":
            featurizer.weights.copy_(torch.tensor([0.3, -1.2, 0.7]))
        wavs = wavs_of(LENGTHS) + [wav[:length] for wav, length in zip(wavs_of([400] * len(SHORT), 1), SHORT)]
        rows = featurizer(wavs, upstream(wavs))
        for wav, row in zip(wavs, rows):
            single, = featurizer([wav], alone([wav]))
            assert len(row) == round(len(wav) / 320)
            assert torch.equal(row, single), len(wav)


@pytest.mark.parametrize("layers, hop", [(SMALL["conv_feature_layers"][:-1], 160),
                                         ((*SMALL["conv_feature_layers"], (8, 2, 2)), 640)])
def test_a_student_with_another_hop_says_so(tmp_path, layers, hop):
    path = checkpoint(tmp_path / "student.safetensors", {**SMALL, "conv_feature_layers": layers})
    upstream = hub.gendistiller(ckpt=str(path)).eval()
    featurizer = interfaces.Featurizer(upstream, upstream_device="cpu")
    assert upstream.get_downsample_rates("hidden_states") == featurizer.downsample_rate == hop
    wavs = wavs_of(LENGTHS)
    with torch.no_grad():
        for wav, row in zip(wavs, featurizer(wavs, upstream(wavs))):
            assert len(row) == round(len(wav) / hop)
            assert torch.equal(row, featurizer([wav], upstream([wav]))[0])


def test_batched_as_alone_through_s3prlupstream(ckpt):
    model = S3PRLUpstream("gendistiller", ckpt).eval()
    featurizer = Featurizer(model)
    # S3PRL itself appends zeros to a batch whose longest clip is under 800 samples, and takes them for audio.
    wavs = wavs_of([length for length in LENGTHS if length >= 800])
    with torch.no_grad():
        batch, frames = featurizer(*model(*padded(wavs)))
        for i, wav in enumerate(wavs):
            single, (count,) = featurizer(*model(wav[None], torch.tensor([len(wav)])))
            assert frames[i] == count == math.ceil(len(wav) / 320)
            assert torch.equal(batch[i, :count], single[0, :count]), len(wav)


def test_every_length_has_its_frames(ckpt):
    upstream = hub.gendistiller(ckpt=ckpt).eval()
    featurizer = interfaces.Featurizer(upstream, upstream_device="cpu")
    wav = wavs_of([2000])[0]
    wavs = [wav[:length] for length in range(1, 2001, 7)]
    with torch.no_grad():
        rows = featurizer(wavs, upstream(wavs))
    assert [len(row) for row in rows] == [round(len(wav) / 320) for wav in wavs]


# ---- Training the upstream ---------------------------------------------------------------------------------


def test_trainable_upstream_gets_the_gradient(ckpt):
    upstream = hub.gendistiller(ckpt=ckpt).eval()
    featurizer = interfaces.Featurizer(upstream, upstream_device="cpu")
    wavs = wavs_of([4000, 2345])
    target = torch.randn(12, generator=torch.Generator().manual_seed(SEED))
    sum((row * target).sum() for row in featurizer(wavs, upstream(wavs))).backward()
    # The same by hand: each state's weight is a third, a repeated frame's gradient goes to the last valid
    # one.
    model = gd.Model.load(ckpt)
    hidden, frames = model.forward([wav.numpy() for wav in wavs])
    grad = np.zeros_like(hidden[0])
    for row, count, wav in zip(grad, frames, wavs):
        row[:count] = target.numpy() / 3
        row[count - 1] *= 1 + round(len(wav) / 320) - count
    flat = model.backward([wav.numpy() for wav in wavs], [grad] * 3)
    for tensor in model.tensors:
        expected = torch.from_numpy(flat[tensor.offset:tensor.offset + tensor.size].reshape(tensor.shape))
        grad = upstream.model.get_parameter(tensor.name).grad
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_dropout_only_when_training_and_trainable(ckpt):
    upstream, wavs = hub.gendistiller(ckpt=ckpt), wavs_of([4000])
    with torch.no_grad():
        plain = upstream.eval()(wavs)["hidden_states"]
        assert same(upstream.train()(wavs)["hidden_states"], plain)
    assert not same(upstream(wavs)["hidden_states"], plain)
    upstream.requires_grad_(False)
    assert same(upstream(wavs)["hidden_states"], plain)
    assert same([state.detach() for state in upstream.requires_grad_().eval()(wavs)["hidden_states"]], plain)


def test_randomized_weights_are_used(ckpt):
    with torch.no_grad():
        plain = S3PRLUpstream("gendistiller", ckpt).eval()(*padded(wavs_of([4000])))[0]
        other = S3PRLUpstream("gendistiller", ckpt, randomize=True).eval()(*padded(wavs_of([4000])))[0]
    assert not same(plain, other)


# ---- Options, cache ----------------------------------------------------------------------------------------


def test_options_from_a_file(ckpt, tmp_path):
    file = tmp_path / "upstream.yaml"
    file.write_text("num_layers: 4\nnum_threads: 1\n")
    upstream = hub.gendistiller_local(ckpt, str(file)).eval()
    assert len(upstream(wavs_of([4000]))["hidden_states"]) == 5
    upstream = hub.gendistiller_local(ckpt, str(file), num_layers=1).eval()
    assert len(upstream(wavs_of([4000]))["hidden_states"]) == 2
    file.write_text("layers: 4\n")
    with pytest.raises(ValueError, match="model_config: expected a mapping of num_layers, .*, got layers"):
        hub.gendistiller_local(ckpt, str(file))


def test_cached_states_are_the_same_bits(ckpt, monkeypatch):
    plain, cached = hub.gendistiller(ckpt=ckpt).eval(), hub.gendistiller(ckpt=ckpt, cache_megabytes=10).eval()
    heard, run = [], cached.model.forward

    def listening(wavs, **options):
        heard.extend(wavs)
        return run(wavs, **options)

    monkeypatch.setattr(cached.model, "forward", listening)
    wavs = wavs_of(LENGTHS)
    with torch.no_grad():
        for batch in ([0, 1, 2], [2, 2, 3], [5, 0], list(range(len(wavs)))):
            given = [wavs[i] for i in batch]
            ours, theirs = cached(given), plain(given)
            assert same(ours["hidden_states"], theirs["hidden_states"])
            assert torch.equal(ours["pad_mask"], theirs["pad_mask"])
    assert len(heard) == len(wavs)
    assert same(cached(wavs)["hidden_states"], plain(wavs)["hidden_states"])
    assert len(heard) == 2 * len(wavs)  # a gradient is wanted: computed, not looked up


def test_cache_forgets_when_the_weights_change(ckpt):
    plain, cached = hub.gendistiller(ckpt=ckpt).eval(), hub.gendistiller(ckpt=ckpt, cache_megabytes=10).eval()
    wavs = wavs_of([4000])
    with torch.no_grad():
        cached(wavs)
        for upstream in (plain, cached):
            upstream.model.get_parameter("layer_norm.weight").data.mul_(1.5)
        assert same(cached(wavs)["hidden_states"], plain(wavs)["hidden_states"])


def test_cache_keeps_to_its_size():
    cache = StateCache(megabytes=0.001)  # 250 floats
    heard = []

    def run(wavs):
        heard.extend(wavs)
        return [torch.stack([wav[:100, None] for wav in wavs])], torch.tensor([100] * len(wavs))

    wavs = [torch.full((100,), float(i)) for i in range(4)]
    for _ in range(2):
        hidden, frames = cache(wavs, 0, run)
        assert torch.equal(hidden[0][..., 0], torch.stack(wavs)) and frames.tolist() == [100] * 4
    assert [int(wav[0]) for wav in heard] == [0, 1, 2, 3, 2, 3] and cache.size == 800


# ---- Where checkpoints come from ---------------------------------------------------------------------------


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="ckpt: no such checkpoint: .*nothing"):
        hub.gendistiller(ckpt=str(tmp_path / "nothing"))


def test_the_shipped_student():
    weights = pytest.importorskip("gendistiller_ext.weights", reason="the package ships no student yet")
    if not weights.student_tiny().is_file():
        pytest.skip("the package ships no student yet")
    out = hub.gendistiller()(wavs_of([4000]))
    assert len(out["hidden_states"]) >= 2


@pytest.fixture
def server(ckpt, tmp_path):
    """(address of a copy of the checkpoint, its bytes, the requests so far)."""
    folder, requests = tmp_path / "web", []
    folder.mkdir()
    with open(ckpt, "rb") as file:
        content = file.read()
    (folder / "student.safetensors").write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

        def send_header(self, name, value):
            if name.lower() == "content-length" and "short" in self.path:
                value = str(int(value) + 1)
            super().send_header(name, value)

    handler = partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/student.safetensors", content, requests
        running.shutdown()
        thread.join()


def test_checkpoint_from_the_web(server, ckpt, tmp_path, monkeypatch):
    url, content, requests = server
    monkeypatch.setenv("GENDISTILLER_CACHE", str(tmp_path / "cache"))
    expected = hub.gendistiller(ckpt=ckpt).eval()(wavs_of([4000]))["hidden_states"]
    digest = hashlib.sha256(content).hexdigest()
    calls = [("gendistiller", url, False), ("gendistiller_url", url, False),
             ("gendistiller_url", f"{url}#sha256={digest}", False), ("gendistiller", url, True)]
    for name, address, refresh in calls:
        upstream = getattr(hub, name)(ckpt=address, refresh=refresh).eval()
        assert same(upstream(wavs_of([4000]))["hidden_states"], expected)
    assert len(requests) == 2  # the first, and the refresh


def test_wrong_downloads_leave_nothing(server, tmp_path):
    url, content, _ = server
    cache = tmp_path / "cache"
    wrong, right = "0" * 64, hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"expected sha256 {wrong}, got {right}"):
        download.cached(f"{url}#sha256={wrong}", folder=cache)
    with pytest.raises(ValueError, match="url: expected nothing or sha256=HEX after #, got 'md5=1'"):
        download.cached(f"{url}#md5=1", folder=cache)
    with pytest.raises(OSError, match="404|Not Found"):
        download.cached(url.replace("student", "other"), folder=cache)
    with pytest.raises(Exception, match="of|IncompleteRead"):
        download.cached(url + "?short", folder=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    path = download.cached(url, folder=cache)
    with pytest.raises(ValueError, match="the sha256 is not"):
        download.cached(f"{url}#sha256={wrong}", folder=cache)
    assert path.read_bytes() == content
