"""The engine against other people's models with the same weights: S3PRL's WavLM, Hugging Face's encoders, and
the shared teacher through S3PRL."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from conftest import SEED, SMALL_TEACHERS
from engine import build, gd
from reference.layout import as_config, random_state, random_wavs
from reference.peers import HUGGINGFACE, huggingface_of, wavlm_of, wavlm_states

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")
WAVLM_CONV = {"conv_pos": 128, "conv_pos_groups": 3}
LENGTHS = [400, 719, 16000, 96000]


def assert_states(hidden, theirs, tolerance=2e-4):
    assert len(hidden) == len(theirs)
    for s, (h, t) in enumerate(zip(hidden, theirs)):
        assert h.shape == tuple(t.shape)
        assert np.abs(h - t.numpy()).max() < tolerance, f"state {s}: {np.abs(h - t.numpy()).max():.2e}"


def source(config, wav):
    """What the peer is fed: it leaves normalisation to its caller."""
    wav = torch.tensor(wav)[None]
    return F.layer_norm(wav, wav.shape[1:]) if as_config(config).normalize else wav


def unilm_file(path, model, state):
    """A checkpoint as unilm publishes WavLM: its config and its tensors, the mask embedding among them."""
    torch.save(
        {"cfg": dict(vars(model.cfg)), "model": {k: v.clone() for k, v in model.state_dict().items()}}, path
    )


@pytest.mark.parametrize("name", ["wavlm", "hubert", "wavlm_large"])
def test_s3prl_wavlm(name, tmp_path):
    """Through a file in unilm's format; HuBERT's blocks are WavLM's without the bias."""
    config = {**SMALL_TEACHERS[name], **WAVLM_CONV}
    state = random_state(config, SEED)
    peer = wavlm_of(config, state)
    unilm_file(tmp_path / "wavlm.pt", peer, state)
    model = gd.Model.load(tmp_path / "wavlm.pt")
    assert model.config.architecture == "encoder" and model.config.normalize == as_config(config).normalize
    for wav in random_wavs(LENGTHS, SEED):
        assert_states(model.forward([wav])[0], wavlm_states(peer, source(config, wav)))


def test_s3prl_wavlm_base():
    """WavLM Base at its full size, 94 million parameters."""
    config = gd.Config.preset("wavlm_base").to_dict()
    state = random_state(config, SEED)
    wav = random_wavs([16000], SEED)[0]
    assert_states(
        build(config, state).forward([wav])[0], wavlm_states(wavlm_of(config, state), torch.tensor(wav)[None])
    )


@pytest.mark.parametrize("kind,name", HUGGINGFACE)
def test_huggingface(kind, name):
    config = {**SMALL_TEACHERS[name], **WAVLM_CONV}
    state = random_state(config, SEED)
    peer, model = huggingface_of(kind, config, state), build(config, state)
    for wav in random_wavs(LENGTHS, SEED):
        with torch.no_grad():
            theirs = peer(source(config, wav), output_hidden_states=True).hidden_states
        assert_states(model.forward([wav])[0], theirs)


@pytest.fixture(scope="module")
def teacher(teacher_path):
    """(gd.Model, S3PRL's WavLM) of the shared teacher's file."""
    wavlm = pytest.importorskip("s3prl.upstream.wavlm.WavLM")
    file = torch.load(teacher_path, weights_only=True)
    peer = wavlm.WavLM(wavlm.WavLMConfig(file["cfg"])).eval()
    peer.load_state_dict(file["model"])
    return gd.Model.load(teacher_path), peer


def test_shared_teacher_on_speech(teacher, data_dir):
    """Real weights on real speech: three utterances of different lengths, each state."""
    soundfile = pytest.importorskip("soundfile")
    model, peer = teacher
    for path in sorted(data_dir.glob("LibriSpeech/*/*/*/*.flac"))[::40][:3]:
        wav = soundfile.read(path, dtype="float32")[0]
        assert_states(model.forward([wav])[0], wavlm_states(peer, torch.tensor(wav)[None]))


def test_shared_teacher_alone_is_its_batch(teacher):
    """S3PRL's states of an utterance alone are what the engine gives it in a mixed batch."""
    model, peer = teacher
    wavs = [0.1 * wav for wav in random_wavs([16000, 4321, 9000], SEED)]
    hidden, frames = model.forward(wavs)
    for b, wav in enumerate(wavs):
        assert_states(
            [h[b : b + 1, : frames[b]] for h in hidden], wavlm_states(peer, torch.tensor(wav)[None])
        )
