"""How S3PRL comes to know the upstreams: the .pth file, the import hook, and what it puts back into
torchaudio."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import s3prl_upstream

PACKAGE = Path(s3prl_upstream.__file__).parent
PTH = PACKAGE / "gendistiller_s3prl.pth"

#: A site-packages of a few lines: what the hook looks at, in an old and in a new torchaudio.
FAKES = {
    "s3prl/__init__.py": "",
    "s3prl/hub.py": "def fbank(): pass",
    "s3prl/run_downstream.py": "import torchaudio\nfrom s3prl import hub\n"
                               "torchaudio.set_audio_backend('sox_io')\nprint(callable(hub.gendistiller))",
    "s3prl/downstream/__init__.py": "",
    "s3prl/downstream/speech_commands/__init__.py":
        "from catalyst.data.sampler import DistributedSamplerWrapper",
    "torchaudio/__init__.py": "from . import _extension\ndef load(uri): raise ImportError('TorchCodec')",
    "torchaudio/_extension/__init__.py": "from .utils import _load_lib\nAVAILABLE = _load_lib('_torchaudio')",
    "torchaudio/_extension/utils.py": "def _load_lib(lib): return True",
}
FOREIGN_LIBRARY = {
    "torchaudio/_extension/utils.py": "def _load_lib(lib): raise OSError('libcudart.so.12: cannot open')"}


@pytest.fixture
def run(tmp_path):
    """run(program, files={}, **env): what a new interpreter prints, whose site-packages has the .pth and the
    FAKES."""
    def run(program, files={}, **env):
        site = tmp_path / "site"
        shutil.rmtree(site, ignore_errors=True)
        for name, text in {**FAKES, **files}.items():
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        shutil.copy(PTH, site)
        # Python looks for .pth files in site-packages alone; a sitecustomize does the same for this folder.
        (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(PACKAGE.parent))), **env}
        command = [sys.executable, *([program] if program.endswith(".py") else ["-c", program])]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=site)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return done.stdout.split()
    return run


def test_upstreams_are_registered(run):
    assert run("from s3prl import hub; print(*sorted(n for n in vars(hub) if n[0] != '_'))") == [
        "fbank", "gendistiller", "gendistiller_local", "gendistiller_url"]


def test_switched_off(run):
    assert run("from s3prl import hub; print(*sorted(n for n in vars(hub) if n[0] != '_'))",
               GENDISTILLER_S3PRL="0") == ["fbank"]
    assert run("import sys; print(*[n for n in sys.modules if 's3prl' in n])", GENDISTILLER_S3PRL="0") == []


def test_nothing_is_imported_at_start(run):
    # -S -E would be a bare interpreter; what matters is what the .pth adds to one with site.
    listed = "import sys; print(*sorted(sys.modules))"
    added = set(run(listed)) - set(run(listed, GENDISTILLER_S3PRL="0"))
    assert added == {"s3prl_upstream", "s3prl_upstream._hook"}


def test_costs_less_than_a_millisecond(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "s3prl_upstream", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tmp_path)], check=True)  # as pip does
    # Without site, which imports os and would run an installed package's own line.
    line = PTH.read_text()
    program = f"import os, sys, time; sys.path.insert(0, {str(tmp_path)!r}); begin = time.perf_counter()\n" \
              f"exec({line!r}); print(time.perf_counter() - begin, sys.modules['s3prl_upstream'].__file__)"
    times = []
    for _ in range(9):
        seconds, path = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True,
                                       text=True, check=True).stdout.split()
        assert path.startswith(str(tmp_path))
        times.append(float(seconds))
    assert min(times) < 1e-3, times


def test_a_removed_package_is_no_error(run, tmp_path):
    program = "import sys; print('s3prl_upstream' in sys.modules)"
    assert run(program, {"s3prl_upstream/__init__.py": "raise RuntimeError('damaged')"}) == ["False"]


def test_other_programs_are_left_alone(run):
    program = "import torchaudio as t; print(hasattr(t, 'set_audio_backend'), hasattr(t, 'info'))"
    assert run(program) == ["False", "False"]
    program = "try:\n import torchaudio\nexcept OSError as error: print(error)"
    assert run(program, FOREIGN_LIBRARY) == ["libcudart.so.12:", "cannot", "open"]


@pytest.mark.parametrize("first", ["s3prl", "torchaudio"])
def test_torchaudio_is_completed_in_either_order(run, first):
    pytest.importorskip("soundfile")
    pytest.importorskip("torch")
    second = {"s3prl": "torchaudio", "torchaudio": "s3prl"}[first]
    program = f"import {first}, {second}; import torchaudio as t; " \
              "from torchaudio.sox_effects import apply_effects_file as effects; " \
              "print(t.set_audio_backend('sox_io'), t.info.__module__, t.load.__module__, effects.__module__)"
    assert run(program) == ["None", "s3prl_upstream.audio", "s3prl_upstream.audio", "s3prl_upstream.sox"]


def test_a_library_of_another_build_counts_as_none(run):
    pytest.importorskip("torch")
    pytest.importorskip("soundfile")
    program = "import s3prl, torchaudio; print(torchaudio._extension.AVAILABLE)"
    assert run(program) == ["True"]
    assert run(program, FOREIGN_LIBRARY) == ["False"]
    # run_downstream.py imports torchaudio before s3prl.
    assert run("s3prl/run_downstream.py", FOREIGN_LIBRARY) == ["True"]


@pytest.mark.parametrize("editable", ["finder", "path"])
def test_checkouts_of_s3prl(run, editable, tmp_path):
    """An editable install is found by a finder of its own, not by sys.path."""
    elsewhere = tmp_path / "checkout" / "s3prl"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("")
    (elsewhere / "hub.py").write_text("checkout = True")
    finder = f"""
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 's3prl':
            return importlib.util.spec_from_file_location(name, {str(elsewhere / "__init__.py")!r},
                                                          submodule_search_locations=[{str(elsewhere)!r}])
sys.meta_path.insert(1, Finder)
"""
    lines = {"finder": finder, "path": f"import sys; sys.path.insert(0, {str(elsewhere.parent)!r})"}[editable]
    lines += "\nfrom s3prl import hub; print(hub.checkout, callable(hub.gendistiller))"
    assert run(lines) == ["True", "True"]


def test_one_class_of_catalyst_is_supplied(run):
    pytest.importorskip("torch")
    hidden = "import sys, importlib.machinery as m; find = m.PathFinder.find_spec; " \
             "m.PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: " \
             "None if name == 'catalyst' else find(name, path, target)); "
    program = "import s3prl.downstream.speech_commands as s; print(s.DistributedSamplerWrapper.__module__)"
    assert run(hidden + program) == ["s3prl_upstream.catalyst_sampler"]
    found = {"catalyst/__init__.py": "", "catalyst/data/__init__.py": "",
             "catalyst/data/sampler.py": "DistributedSamplerWrapper = int"}
    assert run("import s3prl.downstream.speech_commands as s; print(s.DistributedSamplerWrapper)", found) == [
        "<class", "'int'>"]
    program = "import s3prl\ntry:\n import catalyst\nexcept ImportError: print('absent')"
    assert run(hidden + "exec(" + repr(program) + ")") == ["absent"]


def test_dealt_samples_are_the_drawn_ones():
    pytest.importorskip("torch")
    from s3prl_upstream.catalyst_sampler import wrapper_class
    from torch.utils.data import WeightedRandomSampler

    class Drawn(WeightedRandomSampler):
        def __iter__(self):
            return iter([5, 5, 7, 9, 11, 2])

    drawn = Drawn([1.0] * 6, 6)
    dealt = [list(wrapper_class()(drawn, num_replicas=2, rank=rank)) for rank in range(2)]
    assert [len(part) for part in dealt] == [3, 3]
    assert sorted(dealt[0] + dealt[1]) == [2, 5, 5, 7, 9, 11]


@pytest.mark.skipif(not (Path(sysconfig.get_path("platlib")) / PTH.name).is_file(),
                    reason="gendistiller_ext is not installed from a wheel here")
def test_the_installed_wheel_registers_itself():
    pytest.importorskip("s3prl")
    left_out = ("PYTHONPATH", "GENDISTILLER_S3PRL")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    program = "from s3prl import hub; print(hub.gendistiller.__module__)"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.split()[0] == "s3prl_upstream.hubconf", done.stderr


# ---- torchaudio's functions --------------------------------------------------------------------------------


def complete_module():
    """A torchaudio up to 2.8 with its libraries."""
    effects = ModuleType("torchaudio.sox_effects")
    effects.effect_names = lambda: ["gain", "rate"]
    effects.apply_effects_file = effects.apply_effects_tensor = print
    module = ModuleType("torchaudio")
    module.load = module.save = module.info = module.set_audio_backend = print
    module.list_audio_backends = lambda: ["soundfile", "sox"]
    module.sox_effects = effects
    return module


@pytest.fixture
def completed(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("soundfile")
    from s3prl_upstream import compat

    def completed(module):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torchaudio", module)
        # Set and taken away again, so that what the call puts there is undone after the test.
        monkeypatch.setitem(sys.modules, "torchaudio.sox_effects", None)
        del sys.modules["torchaudio.sox_effects"]
        if hasattr(module, "sox_effects"):
            sys.modules["torchaudio.sox_effects"] = module.sox_effects
        compat.complete_torchaudio(module)
        return {name: getattr(module, name).__module__ for name in ("load", "save", "info")} | {
            "effects": module.sox_effects.apply_effects_file.__module__}
    return completed


def test_a_complete_torchaudio_is_left_as_it_is(completed):
    module = complete_module()
    before = dict(vars(module)), dict(vars(module.sox_effects))
    completed(module)
    assert (dict(vars(module)), dict(vars(module.sox_effects))) == before


def test_each_missing_part_is_put_back(completed):
    files = ("load", "save", "info")
    ours = {**dict.fromkeys(files, "s3prl_upstream.audio"), "effects": "s3prl_upstream.sox"}
    theirs = dict.fromkeys((*files, "effects"), "builtins")
    module = complete_module()
    module.list_audio_backends = lambda: []
    assert completed(module) == {**ours, "effects": "builtins"}

    def no_sox():
        raise RuntimeError("libsox.so: cannot open")

    module = complete_module()
    module.sox_effects.effect_names = no_sox
    assert completed(module) == {**theirs, "effects": ours["effects"]}
    module = complete_module()
    del module.list_audio_backends, module.set_audio_backend, module.sox_effects, module.info
    assert completed(module) == ours
    assert module.set_audio_backend("sox_io") is None


def test_torchcodec_is_used_where_it_works(completed, monkeypatch):
    module = complete_module()
    del module.list_audio_backends, module.info
    codec, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    codec.__spec__ = SimpleNamespace(name="torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec", codec)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    assert completed(module) == {"load": "builtins", "save": "builtins", "info": "s3prl_upstream.audio",
                                 "effects": "builtins"}


def test_audio_files(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("soundfile")
    from s3prl_upstream import audio

    wave = torch.from_numpy(np.random.default_rng(0).uniform(-0.9, 0.9, (2, 1000)).astype(np.float32))
    audio.save(tmp_path / "a.wav", wave, 16000)
    found, rate = audio.load(tmp_path / "a.wav")
    assert rate == 16000 and torch.equal(found, wave)
    assert torch.equal(audio.load(str(tmp_path / "a.wav"), frame_offset=10, num_frames=20)[0], wave[:, 10:30])
    assert torch.equal(audio.load(tmp_path / "a.wav", channels_first=False)[0], wave.T)
    assert tuple(audio.info(tmp_path / "a.wav")) == (16000, 1000, 2, 32, "PCM_F")
    audio.save(tmp_path / "b.wav", wave, 8000, encoding="PCM_S", bits_per_sample=16)
    assert tuple(audio.info(tmp_path / "b.wav")) == (8000, 1000, 2, 16, "PCM_S")
    integers, _ = audio.load(tmp_path / "b.wav", normalize=False)
    assert integers.dtype == torch.int16 and (integers / 32768 - wave).abs().max() < 1 / 32768
    audio.save(tmp_path / "c.flac", wave, 16000)
    assert tuple(audio.info(tmp_path / "c.flac")) == (16000, 1000, 2, 16, "FLAC")
    with open(tmp_path / "a.wav", "rb") as file:
        assert torch.equal(audio.load(file)[0], wave)
    with pytest.raises(ValueError, match=r"src: expected \(channels, frames\), got \(1000,\)"):
        audio.save(tmp_path / "d.wav", wave[0], 16000)
    with pytest.raises(ValueError, match="encoding: no PCM_F of 16 bits"):
        audio.save(tmp_path / "d.wav", wave, 16000, encoding="PCM_F", bits_per_sample=16)
    assert not (tmp_path / "d.wav").exists()


def test_sox_effects(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("soundfile")
    from s3prl_upstream import audio, sox

    wave = torch.sin(2 * torch.pi * 200 * torch.arange(8000) / 8000)
    tone = torch.stack((0.5 * wave, 0.1 * wave))
    audio.save(tmp_path / "tone.wav", tone, 8000)
    out, rate = sox.apply_effects_file(tmp_path / "tone.wav", [["channels", "1"], ["gain", "-3.0"]])
    assert rate == 8000 and torch.allclose(out, tone.mean(0, keepdim=True) * 10 ** (-3 / 20), atol=1e-7)
    loud, _ = sox.apply_effects_tensor(tone, 8000, [["gain", "12"]])
    assert loud.abs().max() == 1
    normed, _ = sox.apply_effects_tensor(tone, 8000, [["norm", "-6"]])
    assert normed.abs().max() == pytest.approx(10 ** (-6 / 20))
    same, rate = sox.apply_effects_tensor(tone.T, 8000, [["rate", "8000"]], channels_first=False)
    assert rate == 8000 and torch.equal(same, tone.T)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="effects: silence, gain: needs the sox program"):
        sox.apply_effects_tensor(tone, 8000, [["channels", "1"], ["silence", "1", "0.1", "1%"],
                                              ["gain", "-3"]])
    pytest.importorskip("soxr")
    out, rate = sox.apply_effects_tensor(tone, 8000, [["rate", "16000"]])
    expected = 0.5 * torch.sin(2 * torch.pi * 200 * torch.arange(16000) / 16000)
    assert rate == 16000 and out.shape == (2, 16000)
    assert (out[0] - expected)[4000:-4000].abs().max() < 1e-4


@pytest.mark.skipif(shutil.which("sox") is None, reason="the sox program is not installed")
@pytest.mark.parametrize("effects", [[["channels", "1"], ["gain", "-3.0"]], [["channels", "1"], ["norm"]],
                                     [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]])
def test_effects_agree_with_the_program(effects):
    torch = pytest.importorskip("torch")
    from s3prl_upstream import sox

    wave = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 8000)).astype(np.float32))
    ours, rate = sox.apply_effects_tensor(wave, 8000, effects)
    theirs, same_rate = sox._program(wave, 8000, effects)
    assert rate == same_rate and ours.shape == theirs.shape
    tolerance = 1e-3 if rate != 8000 else 1e-6
    assert (ours - theirs).abs().max() < tolerance
