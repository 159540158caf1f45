"""States, features and logs on the disk: exact, and whole whatever happens while they are written."""
import dataclasses
import json
import os

import numpy as np
import pytest

from disk import full_disk
from gendistiller_ext.training import state
from gendistiller_ext.training.counters import Counters
from gendistiller_ext.training.report import Log, TimeLeft, Window, read_log


def test_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    folder = str(tmp_path / "state")
    arrays = {"params": np.arange(1000, dtype=np.float32)}
    state.save_state(folder, 1, arrays, {"n": 1})
    with monkeypatch.context() as patch:
        full_disk(patch, 2000)
        with pytest.raises(OSError, match="No space left"):
            state.save_state(folder, 2, arrays, {"n": 2})
    assert os.listdir(folder) == ["step-00000001.state"]
    path, loaded, document = state.load_newest(folder, pytest.fail)
    assert document == {"n": 1} and np.array_equal(loaded["params"], arrays["params"])


def test_states_two_newest_and_damage(tmp_path):
    folder = str(tmp_path)
    for step in (1, 2, 30):
        state.save_state(folder, step, {"x": np.full(5, step, np.int64)}, {"step": step})
    (tmp_path / "step-00000031.state.123.tmp").write_bytes(b"half")
    assert [step for step, _ in state.state_files(folder)] == [30, 2]
    newest = tmp_path / "step-00000030.state"
    content = bytearray(newest.read_bytes())
    for position in (0, 9, len(content) // 2, len(content) - 40, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        newest.write_bytes(damaged)
        warned = []
        assert state.load_newest(folder, warned.append)[2] == {"step": 2} and len(warned) == 1
    for length in (0, 7, 39, len(content) - 1):
        newest.write_bytes(content[:length])
        assert state.load_newest(folder, lambda line: None)[2] == {"step": 2}
    (tmp_path / "step-00000002.state").write_bytes(b"")
    with pytest.raises(ValueError, match="resume: no usable state in .*, all 2 are damaged"):
        state.load_newest(folder, lambda line: None)
    assert state.load_newest(str(tmp_path / "none"), pytest.fail) is None
    state.save_state(folder, 40, {"x": np.zeros(1)}, {})
    assert not (tmp_path / "step-00000031.state.123.tmp").exists()


def test_log_rows_after_the_resumed_step_are_dropped(tmp_path):
    pytest.importorskip("tensorboardX")
    log = Log(str(tmp_path), (4,))
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.1 * step})
    log.close()
    with open(tmp_path / "log.csv", "a") as stream:
        stream.write("4,0.1,")  # cut short
    log = Log(str(tmp_path), (4,), resume_step=2)
    log.write({"step": 3, "loss": 7.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_log(str(tmp_path / "log.csv"))] == [(1, 0.1), (2, 0.2), (3, 7.0)]


def test_time_left_counts_evaluations():
    """Ten steps of 2 s and an evaluation of 30 s after every fifth one, 100 steps in all."""
    now = [0.0]
    left = TimeLeft(100, 0, 5, clock=lambda: now[0])
    assert left.seconds() is None
    now[0] += 30
    left.evaluation(30.0)
    for step in range(1, 11):
        now[0] += 2
        left.step()
        due = 20 - (step - 1) // 5 if step % 5 else 20 - step // 5
        assert left.seconds() == pytest.approx((100 - step) * 2 + due * 30)
        if step % 5 == 0:
            now[0] += 30
            left.evaluation(30.0)
    for _ in range(90):
        now[0] += 2
        left.step()
    assert left.seconds() == 0
    resumed = TimeLeft(7, 4, 5, clock=lambda: now[0])
    now[0] += 3
    resumed.step()
    resumed.evaluation(10.0)
    assert resumed.seconds() == pytest.approx(2 * 3 + 10)


def counted():
    """Counters of which none has its first value."""
    window = Window(2)
    window.add(1.5, 0.25, {"feature_penalty": 0.5, "l1": [1, 2], "cos": [3, 4], "similarity": [0.5, 0.25]})
    counters = Counters(window, 7, 1, 2, 30.5, 4.25, {"b.wav", "a.wav"}, {"valid_loss": 2.0}, {"valid_loss": 1.0})
    first = Counters(Window(2))
    assert not [item.name for item in dataclasses.fields(Counters)
                if item.name != "window" and getattr(counters, item.name) == getattr(first, item.name)]
    return counters


def test_counters_are_written_and_read_whole():
    saved = json.loads(json.dumps(counted().to_json()))
    again = Counters.from_json(saved, "x.state", 2)
    assert dataclasses.replace(again, window=None) == dataclasses.replace(counted(), window=None)
    assert again.window.values == counted().window.values and again.to_json() == saved


def test_counters_that_are_missing_or_unknown_name_the_file():
    saved = counted().to_json()
    for name in saved:
        wrong = {key: value for key, value in saved.items() if key != name}
        with pytest.raises(ValueError, match=f"^x.state: counters: expected '{name}', got none$"):
            Counters.from_json(wrong, "x.state", 2)
    with pytest.raises(ValueError, match="^x.state: counters: unknown 'epochs'$"):
        Counters.from_json({**saved, "epochs": 3}, "x.state", 2)
    with pytest.raises(ValueError, match="^x.state: counters: window: unknown 'loss2'$"):
        Counters.from_json({**saved, "window": {**saved["window"], "loss2": 3}}, "x.state", 2)
    with pytest.raises(ValueError, match="^x.state: counters: expected an object, got list$"):
        Counters.from_json([], "x.state", 2)
