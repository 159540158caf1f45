"""Runs that are killed at any moment, and disks that are full: nothing but time is lost."""
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

for module in ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib"):
    pytest.importorskip(module)

from gendistiller_ext.training import state  # noqa: E402
from runs import ENVIRONMENT, assert_same_run, flags, recipe, train  # noqa: E402

# Imports once, then forks: a run starts at once and is killed after a random time. A run that ends before is begun
# anew. States are written slowly, so that kills fall into that too. Prints one JSON line a kill.
KILLER = """
import json, os, random, shutil, signal, sys, time
import gendistiller_ext as gd
from gendistiller_ext.checkpoints import safetensors
from gendistiller_ext.training import state, trainer
import matplotlib, soundfile, soxr, tensorboardX, tqdm, yaml
from runs import recipe

corpus, out, settings, times, longest, seed = json.loads(sys.argv[1])
trainer.draw_curves = lambda *paths: None
chunks = safetensors.chunks

def slow_chunks(*arguments):
    for piece in chunks(*arguments):
        time.sleep(0.003)
        yield piece
safetensors.chunks = slow_chunks
moments = random.Random(seed)
killed = 0
while killed < times:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            trainer.Trainer(recipe(corpus, out, resume=True, **settings), lambda line: None, quiet=True).train()
            code = 0
        finally:
            os._exit(code)
    time.sleep(moments.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        if status:
            sys.exit(f"ended with status {status}")
        shutil.rmtree(out)
        continue
    killed += 1
    student = os.path.join(out, "student.safetensors")
    if os.path.exists(student):
        gd.Model.load(student)  # whole, always
    said = []
    found = state.load_newest(os.path.join(out, "state"), said.append)
    torn = [name for name in os.listdir(os.path.join(out, "state")) if name.endswith(".tmp")] if found else []
    print(json.dumps({"step": found[2]["counters"]["step"] if found else 0, "said": said, "torn": torn}), flush=True)
"""


def kill(folder, corpus, out, settings, times, longest, seed):
    script = folder / "killer.py"
    script.write_text(KILLER)
    words = json.dumps([corpus, str(out), settings, times, longest, seed])
    done = subprocess.run([sys.executable, str(script), words], env=ENVIRONMENT, text=True, capture_output=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_twenty_times_it_ends_in_the_same_weights(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("gendistiller_ext.training.trainer.draw_curves", lambda *paths: None)
    settings = dict(steps=1500, save_every=7, eval_every=31, log_every=5, accumulate=2)
    train(recipe(corpus, tmp_path / "whole", **settings))
    kills = kill(tmp_path, corpus, tmp_path / "broken", settings, times=20, longest=0.6, seed=5)
    steps = [entry["step"] for entry in kills]
    assert len(kills) == 20 and len(set(steps)) >= 5, steps
    assert not any(entry["said"] for entry in kills)  # no state was torn
    assert any(entry["torn"] for entry in kills)  # though some were being written
    train(recipe(corpus, tmp_path / "broken", resume=True, **settings))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert len(state.state_files(str(tmp_path / "broken" / "state"))) == state.KEEP


MEMORY = """
import json, sys
from gendistiller_ext.training import trainer
from runs import recipe

sizes = []
train_step = trainer.Trainer._train_step

def measured(self, batch):
    loss = train_step(self, batch)
    if self.counters.step % 50 == 0:
        with open("/proc/self/statm") as stream:
            sizes.append(int(stream.read().split()[1]) * 4096)
    return loss
trainer.Trainer._train_step = measured
settings = dict(steps=1200, save_every=50, eval_every=60, log_every=2, accumulate=2)
trainer.Trainer(recipe(json.loads(sys.argv[1]), sys.argv[2], **settings), lambda line: None, quiet=True).train()
print(json.dumps(sizes))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc, which tells the resident set")
def test_the_resident_set_is_flat(corpus, tmp_path):
    """From step 400 on, when each length of batch has come and every buffer is there."""
    (tmp_path / "memory.py").write_text(MEMORY)
    done = subprocess.run([sys.executable, str(tmp_path / "memory.py"), json.dumps(corpus), str(tmp_path / "out")],
                          env=ENVIRONMENT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)[7:]
    assert len(sizes) == 17 and max(sizes) <= 1.01 * sizes[0], sizes


# ---- Full disks --------------------------------------------------------------------------------------------

def distill(words, limit=None):
    """limit: bytes that a file may have."""
    def shrink():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run([sys.executable, *words], env=ENVIRONMENT, text=True, capture_output=True, timeout=100,
                          preexec_fn=shrink if limit else None)


def assert_one_line(done, reason):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and reason in errors[0], done.stderr
    assert errors[0].startswith("gendistiller distill: error: ")
    assert "Traceback" not in done.stderr


def test_files_that_may_not_grow(corpus, tmp_path):
    train(recipe(corpus, tmp_path / "whole", valid_fraction=0.4))
    out = tmp_path / "out"
    train(recipe(corpus, out, valid_fraction=0.4))
    os.unlink(out / "state" / "step-00000012.state")  # as it was after step 10
    before = sorted(os.listdir(out / "state"))
    kept = (out / "state" / before[0]).read_bytes()
    done = distill([*flags(corpus, out), "--resume", "--quiet"], limit=20000)  # a state has more
    assert len(kept) > 20000
    assert_one_line(done, "File too large")
    assert sorted(os.listdir(out / "state")) == before and (out / "state" / before[0]).read_bytes() == kept
    assert distill([*flags(corpus, out), "--resume", "--quiet"]).returncode == 0
    assert_same_run(tmp_path / "whole", out)


ON_A_SMALL_DISK = 'mount -t tmpfs -o size="$SIZE" tmpfs "$DISK" && "$@"; code=$?; cp -r "$DISK" "$COPY"; exit $code'


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare, which makes a small disk")
@pytest.mark.parametrize("kilobytes", [60, 170])
def test_a_full_disk(corpus, tmp_path, kilobytes):
    (tmp_path / "disk").mkdir()
    where = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    environment = {**ENVIRONMENT, "DISK": str(tmp_path / "disk"), "COPY": str(tmp_path / "copy"),
                   "SIZE": f"{kilobytes}k"}
    if subprocess.run([*where, "true"], env=environment, capture_output=True).returncode:
        pytest.skip("no small disks here: a tmpfs can't be mounted")
    shutil.rmtree(tmp_path / "copy")
    words = flags(corpus, tmp_path / "disk" / "out", **{"log-every": 1, "steps": 40})
    done = subprocess.run([*where, sys.executable, *words, "--quiet"], env=environment, text=True, capture_output=True)
    assert_one_line(done, "No space left on device")
    out = tmp_path / "copy" / "out"
    assert not [name for name in os.listdir(out / "state") if name.endswith(".tmp")]
    said = []
    found = state.load_newest(str(out / "state"), said.append)
    assert not said
    train(recipe(corpus, tmp_path / "whole", valid_fraction=0.4, log_every=1, steps=40))
    done = distill([*flags(corpus, out, **{"log-every": 1, "steps": 40}), "--resume"])
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {found[2]['counters']['step'] if found else ''}" in done.stderr or not found
    assert_same_run(tmp_path / "whole", out)
