"""benchmarks/: whatever an engine does, a run ends in time, and says what it left out and why."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import fake_engines
import gendistiller_ext as gd
from conftest import SMALL

import bounds
import machine
import peers
import process
import report
import speed
import together
import trainers
import training
import turns
from process import Failed

PATH = os.pathsep.join([os.path.dirname(fake_engines.__file__), *filter(None, sys.path)])  # of processes started here
LIMIT = 0.5  # seconds: more than any honest answer here takes


@pytest.fixture
def fakes(monkeypatch):
    """fake_engines.py in place of the engines, on a small model."""
    monkeypatch.setattr(process, "WORKER", fake_engines.__file__)
    for table, engines in ((peers.PEERS, fake_engines.ENGINES), (trainers.TRAINERS, fake_engines.TRAINERS)):
        for name in list(table):
            monkeypatch.delitem(table, name)
        for name, engine in engines.items():
            monkeypatch.setitem(table, name, engine)
    monkeypatch.setenv("PYTHONPATH", PATH)
    for program in (speed, training):
        monkeypatch.setattr(program, "make_checkpoint", fake_engines.make_checkpoint)
    for program in (turns, training):
        monkeypatch.setattr(program, "PAUSE", 0)
    monkeypatch.setattr(machine, "build_peak", lambda folder: None)
    monkeypatch.setattr(report, "plot", lambda result, path: False)


def run(tmp_path, names, *words):
    """(exit status, what speed.json has) of the fake engines `names`."""
    status = speed.main(["--models", "gendistiller", "--threads", "1", "--peers", ",".join(names), "--rounds", "3",
                         "--out", str(tmp_path), *words])
    return status, json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))


def passes(result):
    return {(row["peer"], row["seconds"]): len(row["times"]) for row in result["figures"]}


@pytest.mark.parametrize("first, most, budget, expected", [
    (0.1, 9, 20, 9), (4.0, 9, 20, 5), (30.0, 9, 20, 1), (0.0, 9, 20, 9), (20.0, 9, 20, 1), (5.5, 24, 20, 3)])
def test_repeats(first, most, budget, expected):
    assert bounds.repeats(first, most, budget) == expected


@pytest.mark.parametrize("features, lacking", [
    (("generic",), ["bfloat16", "int8"]), (("generic", "avx2", "avx512"), ["bfloat16", "int8"]),
    (("generic", "avx2", "avx_vnni"), ["bfloat16"]), (("avx512", "avx512_vnni", "avx512_bf16"), []),
    (("avx512", "amx_bf16"), ["int8"])])
def test_what_a_processor_lacks(features, lacking, monkeypatch):
    monkeypatch.setattr(gd, "cpu_features", lambda: features)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine.lacking() == lacking


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_late_process_ends_with_what_it_started(tmp_path):
    script = tmp_path / "starts.py"
    script.write_text("import subprocess, sys, time\n"
                      "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
                      "print(f'{{\"child\": {child.pid}}}', flush=True)\ntime.sleep(60)\n")
    with process.Process(tmp_path / "log.txt", 30, script) as late:
        child = late.ask(do="anything")["child"]
        begin = time.perf_counter()
        with pytest.raises(Failed, match="took longer than 0.2 s") as caught:
            late.ask(0.2, do="anything")
        assert caught.value.kind == process.LATE and time.perf_counter() - begin < 5
        while alive(child):
            assert time.perf_counter() - begin < 5
        with pytest.raises(Failed, match="status -9"):
            late.ask(do="anything")


def test_what_is_not_an_answer(tmp_path):
    script = tmp_path / "prints.py"
    script.write_text("print('noise', flush=True)\n")
    with process.Process(tmp_path / "log.txt", 30, script) as prints:
        with pytest.raises(Failed, match="expected a line of JSON, got b'noise'"):
            prints.ask(do="anything")


def test_speed_leaves_out_by_name(fakes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed.Run, "measure_machine", lambda self: None)
    names = ["Honest", "Slow", "Crashes", "Prints", "Wrong", "Raises", "Missing"]
    status, result = run(tmp_path, names, "--seconds", "0.5", "--budget", "0.5")
    assert status == 1 and result["finished"]  # for Wrong
    assert passes(result) == {("gendistiller", 0.5): 3, ("Honest", 0.5): 3, ("Slow", 0.5): 2, ("Prints", 0.5): 3}
    crash, error, missing = (result["skipped"].pop(name) for name in (
        "Crashes, gendistiller, 1 x 0.5 s", "Raises, gendistiller, 1 x 0.5 s", "Missing"))
    assert crash.startswith("the process ended with status 3") and error.startswith("MemoryError: no room (it had ")
    assert "a_package_that_is_not_there" in missing and not result["skipped"]
    assert [line.split(":")[0] for line in result["wrong"]] == ["Wrong, gendistiller, 1 x 0.5 s"]
    told = capsys.readouterr()
    assert f"* Crashes, gendistiller, 1 x 0.5 s: {crash}" in told.out
    assert "Of fewer runs (a budget of 0.5 s each): Slow, gendistiller, 0.5 s, 1 thread: 2." in told.out
    assert re.search(r"^\[ *\d+\.\d s\] first pass, preset gendistiller: Slow, float32, 0\.5 s of audio, 1 thread$",
                     told.err, re.M)


def test_speed_bounds_what_hangs(fakes, tmp_path, monkeypatch):
    """In a first pass, which is not tried with more audio; and in a timed one."""
    monkeypatch.setattr(speed.Run, "measure_machine", lambda self: None)
    status, result = run(tmp_path, ["Hangs", "Hangs later"], "--seconds", "0.5,1.5,2", "--limit", str(LIMIT))
    assert status == 0 and passes(result) == {("gendistiller", 0.5): 3, ("Hangs", 0.5): 3, ("gendistiller", 1.5): 3,
                                              ("gendistiller", 2): 3}
    assert result["skipped"] == {
        "Hangs later, gendistiller, 1 x 0.5 s": f"took longer than {LIMIT} s",
        "Hangs later, gendistiller, 1 x 1.5 s": "took too long at gendistiller, 1 x 0.5 s",
        "Hangs later, gendistiller, 1 x 2 s": "took too long at gendistiller, 1 x 0.5 s",
        "Hangs, gendistiller, 1 x 1.5 s": f"took longer than {LIMIT} s",
        "Hangs, gendistiller, 1 x 2 s": "took too long at gendistiller, 1 x 1.5 s"}


def test_speed_bounds_matrix_products(fakes, tmp_path):
    """24 of 0.05 s each do not fit a quarter of 0.8 s; one that hangs is left out."""
    args = speed.options(["--precision", "int8", "--emulated", "--budget", "0.8", "--limit", str(LIMIT), "--out",
                          str(tmp_path), "--threads", "1"])
    measured = speed.Run(args)
    begin = time.perf_counter()
    measured.measure_machine()
    assert time.perf_counter() - begin < 4.5
    assert [(row["library"], row["precision"]) for row in measured.result["gemm"]] == \
        [("NumPy: fake", "float32")] * 2 + [("PyTorch: fake", "float32")] * 2
    assert measured.result["skipped"] == {
        "PyTorch's matrix products, int8, 1 threads": f"took longer than {LIMIT} s",
        "registers' peak, all": "OSError: no C compiler that takes peak.c"}


@pytest.mark.parametrize("emulated", [False, True])
def test_what_there_are_no_instructions_for(emulated, fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "lacking", lambda: ["int8"])
    measured = speed.Run(speed.options(["--precision", "int8", "--out", str(tmp_path), *["--emulated"] * emulated]))
    measured.result["machine"] = {**machine.describe([]), "load": 0}
    assert ("Fake int8" in measured.peers_of(gd.Config(**SMALL))) == emulated
    note = "no instructions for products in int8. Left out (--emulated times them): Fake int8."
    assert (note in report.speed(measured.result)) != emulated


DRIVER = """
import sys
import fake_engines, process, machine, speed, gendistiller_ext as gd
fake_engines.install()
speed.make_checkpoint = fake_engines.make_checkpoint
process.WORKER = fake_engines.__file__
speed.Run.measure_machine = lambda self: None
speed.report.plot = lambda result, path: False
sys.exit(speed.main())
"""


@pytest.mark.parametrize("number, hangs, measured", [
    (signal.SIGINT, "Hangs", {("gendistiller", 0.5): 2, ("Hangs", 0.5): 2}),  # in the second shape's first pass
    (signal.SIGTERM, "Hangs later", {("gendistiller", 0.5): 1})])  # amid the first's turns
def test_an_interrupt_leaves_a_report(number, hangs, measured, tmp_path):
    command = [sys.executable, "-c", DRIVER, "--models", "gendistiller", "--threads", "1", "--peers", hangs,
               "--seconds", "0.5,1.5", "--rounds", "2", "--out", str(tmp_path)]
    log = tmp_path / "work" / "log.txt"
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PATH}, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as program:
        while not log.is_file() or "hanging" not in log.read_text(encoding="utf-8"):
            assert program.poll() is None
            time.sleep(0.02)
        if hangs == "Hangs":  # written as they come
            assert passes(json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))) == measured
        begin = time.perf_counter()
        program.send_signal(number)
        out, _ = program.communicate(timeout=50)
        assert time.perf_counter() - begin < 15
    assert program.returncode == 130
    result = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert passes(result) == measured and not result["finished"]
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    (tmp_path / "speed.md").unlink()
    assert report.write(tmp_path / "speed.json")[0] == text == (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "**Unfinished" in text and text in out


def test_training_leaves_out_by_name(fakes, tmp_path, capsys):
    status = training.main(["--batch", "1", "--seconds", "0.1", "--rounds", "4", "--budget", "0.5", "--limit",
                            str(LIMIT), "--threads", "1", "--out", str(tmp_path), "--memory"])
    result = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert status == 0 and [(row["peer"], len(row["times"])) for row in result["rows"]] == \
        [("gendistiller", 4), ("Slow", 2)]
    assert all(row["peak_memory"] > 0 for row in result["rows"])
    assert result["skipped"]["Hangs"] == f"took longer than {LIMIT} s" and "Missing" in result["skipped"]
    told = capsys.readouterr()
    assert "| Slow | 0.2" in told.out and f"* Hangs: took longer than {LIMIT} s" in told.out
    assert "first steps: Hangs, float32, 0.1 s of audio, 1 thread" in told.err


def test_together_leaves_out_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "CHILDREN", {"quick": (), "late": (), "slow": ()})
    args = together.options(["--rounds", "3", "--budget", "0.5", "--out", str(tmp_path)])
    values, measured = {}, together.Run(args)

    def measure(processes, name, threads):
        if name == "late":
            raise Failed(process.LATE, "took longer than 7 s")
        time.sleep(0.2 if name == "slow" else 0)
        return [1.0, 2.0]

    measured.take_turns([("quick", 1), ("late", 2), ("slow", 1)], "float32", 2.0, measure, values)
    assert {setting: len(got) for setting, got in values.items()} == {("quick", 1): 6, ("slow", 1): 4}
    assert measured.result["skipped"] == {"late, float32, 2 s, 2 threads": "took longer than 7 s"}
    assert "slow, turn 2 of 2: float32, 2 s of audio, 1 thread" in capsys.readouterr().err
