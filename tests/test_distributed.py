"""Distillation in several processes: the one process's run, files, lost processes, restarts, two hosts."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for module in ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib"):
    pytest.importorskip(module)
import soundfile  # noqa: E402

from gendistiller_ext.training.distributed import Processes, local_device, rank_and_size  # noqa: E402
from gendistiller_ext.training.report import TIMING_COLUMNS, read_log  # noqa: E402
from runs import ENVIRONMENT, flags, params, recipe  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Ranks:
    """Processes with torchrun's environment, without torchrun: they are not ended when one of them is."""

    def __init__(self, size, *arguments):
        shared = {**ENVIRONMENT, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port())}
        self.all = [subprocess.Popen([sys.executable, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                    for rank in range(size)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.all:
            process.kill()
            process.communicate()

    def finish(self, timeout=100):
        """(exit code, stdout, stderr) of each."""
        results = [(*process.communicate(timeout=timeout), process.returncode) for process in self.all]
        return [(code, out, err) for out, err, code in results]


def run_ranks(size, *arguments):
    with Ranks(size, *arguments) as ranks:
        results = ranks.finish()
    assert [code for code, _, _ in results] == [0] * size, results
    return results


def run_alone(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], env=ENVIRONMENT, text=True, capture_output=True,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    return done


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


def rows_of(out):
    return [{key: value for key, value in row.items() if key not in TIMING_COLUMNS}
            for row in read_log(os.path.join(out, "log.csv"))]


def assert_rows_alike(rows, others, relative):
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others):
        filled = {key: value for key, value in other.items() if value is not None}
        assert {key for key, value in row.items() if value is not None} == filled.keys()
        assert {key: row[key] for key in filled} == pytest.approx(filled, rel=relative)


# ---- Who is who --------------------------------------------------------------------------------------------

def test_rank_and_size():
    assert rank_and_size({}) == rank_and_size({"RANK": "3"}) == rank_and_size({"WORLD_SIZE": "3"}) == (0, 1)
    assert rank_and_size({"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)
    for rank, size in (("3", "3"), ("-1", "2"), ("0", "0"), ("x", "2")):
        with pytest.raises(ValueError,
                           match=f"expected 0 <= RANK < WORLD_SIZE in the environment, got {rank} and {size}"):
            rank_and_size({"RANK": rank, "WORLD_SIZE": size})


def test_processes_of_a_machine_have_a_device_each():
    second = {"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    assert [local_device(name, second) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert local_device("cuda", {}) == local_device("cuda", {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == "cuda"


def test_shares_are_the_list_in_order():
    for size in range(1, 6):
        shares = []
        for rank in range(size):
            alone = Processes()
            alone.rank, alone.size = rank, size
            shares.append(alone.share(list(range(7))))
        assert sum(shares, []) == list(range(7)) and max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- The gradient and the run of one process ---------------------------------------------------------------

STEP = """
import sys, json
import numpy as np
from gendistiller_ext.training.distributed import Processes
from gendistiller_ext.training.trainer import Trainer
from runs import recipe
corpus, out = json.loads(sys.argv[1]), sys.argv[2]
wavs = [np.random.default_rng(i).uniform(-0.5, 0.5, n).astype(np.float32)
        for i, n in enumerate((4000, 3000, 900, 5000, 2345))]
with Processes.from_environment(30) as processes:
    for reduction, parts in (("mean", 1), ("sum", 1), ("mean", 2)):
        run = Trainer(recipe(corpus, out, batch_size=5, reduction=reduction, accumulate=parts, feat_pen_loss=500.0),
                      processes=processes)
        run.counters.step = 3
        places = processes.share(list(range(5)))
        loss, terms = run._loss_and_gradient(processes.share(wavs), places[0])
        np.savez(f"{sys.argv[3]}-{reduction}-{parts}-{processes.rank}.npz", grads=run.grads, loss=loss, **terms)
"""


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_is_one_processes(corpus, tmp_path, size):
    """Dropout is on: each utterance has the masks of its place in the whole batch."""
    (tmp_path / "step.py").write_text(STEP)
    arguments = [tmp_path / "step.py", json.dumps(corpus), tmp_path / "out"]
    run_alone(*arguments, tmp_path / "one")
    run_ranks(size, *arguments, tmp_path / "many")
    for case in ("mean-1", "sum-1", "mean-2"):
        whole = np.load(tmp_path / f"one-{case}-0.npz")
        shares = [np.load(tmp_path / f"many-{case}-{rank}.npz") for rank in range(size)]
        for name in whole.files:
            assert all(np.array_equal(share[name], shares[0][name]) for share in shares), name
        error = np.linalg.norm(shares[0]["grads"] - whole["grads"]) / np.linalg.norm(whole["grads"])
        assert error <= 1e-6
        for name in ("loss", "feature_penalty", "l1", "cos", "similarity"):
            np.testing.assert_allclose(shares[0][name], whole[name], rtol=1e-6, err_msg=name)


def test_a_run_of_two_is_a_run_of_one(corpus, tmp_path):
    """With a file that breaks: what is left of a batch keeps the places, so the masks, of a run of one."""
    (tmp_path / "audio").mkdir()
    for name in os.listdir(corpus[1]):
        shutil.copy(os.path.join(corpus[1], name), tmp_path / "audio" / name)
    broken = tmp_path / "audio" / "broken.flac"
    soundfile.write(str(broken), np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 16000)
    broken.write_bytes(broken.read_bytes()[:3000])
    where = corpus[0], str(tmp_path / "audio")
    run_alone(*flags(where, tmp_path / "one"))
    (_, _, said), (_, out, err) = run_ranks(2, *flags(where, tmp_path / "two"))
    assert out == "" and err == ""  # the second process says and writes nothing
    assert said.count("skipped broken.flac") == 1
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert one[0] == two[0] and one[0]["valid_loss"] is not None  # same weights: validation is bit for bit the same
    assert_rows_alike(two, one, 1e-5)
    assert one[-1]["skipped_files"] == 1
    first, second = params(tmp_path / "one"), params(tmp_path / "two")
    apart = {name: np.abs(first[name] - second[name]).max() for name in first}
    # A key's bias has no gradient but rounding, which AdamW scales to a step of its own.
    assert max(value for name, value in apart.items() if not name.endswith("k_proj.bias")) < 1e-5


DEVICE_SUMS = """
import sys, json
import numpy as np
from gendistiller_ext.training import distributed
device, backend, *owned = sys.argv[1:]
distributed.DEVICE_SUMS = backend
if owned:
    distributed._summing_device = lambda device: owned[int(distributed.os.environ["RANK"])] or None
with distributed.Processes.from_environment(30, device=device) as processes:
    sums = []
    for kind in (np.float32, np.float64):
        array = np.arange(5, dtype=kind) + processes.rank
        processes.add(array)
        sums.append(array.tolist())
    print(json.dumps([sums, processes._device_group is not None]))
"""


@pytest.mark.parametrize("owned,used", [(("a", "b"), True), (("a", "a"), False), (("a", ""), False)])
def test_sums_on_devices_where_each_process_has_its_own(tmp_path, owned, used):
    """Copies in the host's memory for those on the devices, gloo in NCCL's place."""
    (tmp_path / "sums.py").write_text(DEVICE_SUMS)
    for _, out, _ in run_ranks(2, tmp_path / "sums.py", "cpu", "gloo", *owned):
        assert json.loads(out) == [[[1, 3, 5, 7, 9]] * 2, used]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices that PyTorch sees")
def test_sums_by_nccl(tmp_path):
    (tmp_path / "sums.py").write_text(DEVICE_SUMS)
    for _, out, _ in run_ranks(2, tmp_path / "sums.py", "cuda", "nccl"):
        assert json.loads(out) == [[[1, 3, 5, 7, 9]] * 2, True]


def test_settings_that_do_not_go_with_parts(corpus, tmp_path):
    from gendistiller_ext.training.trainer import Trainer
    two = Processes()
    two.size = 2
    for changes, message in ((dict(batch_size=1), "batch_size: expected at least 1 for each of the 2 processes, got 1"),
                             (dict(mask_padding=False), "mask_padding: expected true with 2 processes"),
                             (dict(model=dict(target_layers=(1, 3), padding="s3prl")), "padding: expected exact")):
        with pytest.raises(ValueError, match=message):
            Trainer(recipe(corpus, tmp_path, **changes), print, processes=two)
    with pytest.raises(ValueError, match="padding: expected exact"):
        Trainer(recipe(corpus, tmp_path, accumulate=2, model=dict(target_layers=(1, 3), padding="s3prl")), print)


def test_processes_with_other_audio_are_told(corpus, tmp_path):
    script = tmp_path / "other.py"
    script.write_text("import os, sys\nfrom gendistiller_ext.cli import main\n"
                      "words = sys.argv[1:]\n"
                      "if os.environ['RANK'] == '1': words[words.index('--audio') + 1] += '/0.wav'\n"
                      "sys.exit(main(words))\n")
    with Ranks(2, script, *flags(corpus, tmp_path / "out", **{"valid-fraction": 0})[2:]) as ranks:
        results = ranks.finish()
    assert [code for code, _, _ in results] == [2, 2]
    assert "audio: expected the same in every process, processes 1 and 0 differ" in results[0][2]
    assert not (tmp_path / "out").exists()


# ---- Processes that are lost -------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_run(corpus, tmp_path, number):
    out = tmp_path / "out"
    with Ranks(2, *flags(corpus, out, steps=10 ** 6, **{"save-every": 10, "process-timeout": 4})) as ranks:
        wait_for(out / "state" / "step-00000010.state", ranks.all[0])
        begin = time.monotonic()
        ranks.all[1].send_signal(number)
        _, err = ranks.all[0].communicate(timeout=60)
        assert time.monotonic() - begin < 20
    assert ranks.all[0].returncode == 2
    assert err.count("error: ") == 1
    assert "process 0 of 2: another process of the run has ended, or did not answer" in err
    assert any(name.endswith(".state") for name in os.listdir(out / "state"))


def test_a_signal_to_one_stops_all_after_the_same_step(corpus, tmp_path):
    out = tmp_path / "out"
    with Ranks(2, *flags(corpus, out, steps=10 ** 6, **{"save-every": 10})) as ranks:
        wait_for(out / "state" / "step-00000010.state", ranks.all[0])
        ranks.all[1].send_signal(signal.SIGTERM)
        results = ranks.finish()
    assert [code for code, _, _ in results] == [143, 143], results
    stopped = int(max(name for name in os.listdir(out / "state") if name.endswith(".state"))[5:13])
    assert f"{stopped} steps (SIGTERM; go on with --resume)" in results[0][1]


def kill_a_worker_of(torchrun):
    """Of the agent's children the workers are the ones that run our module."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(torchrun.pid)], text=True, capture_output=True)
    workers = [int(line.split()[0]) for line in found.stdout.splitlines() if "gendistiller_ext" in line]
    os.kill(workers[-1], signal.SIGKILL)


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps, which finds torchrun's workers")
def test_torchrun_restarts_and_the_run_goes_on(corpus, tmp_path):
    changes = {"steps": 300, "save-every": 20, "eval-every": 100}
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "--max-restarts", "1"]
    run_ranks(2, *flags(corpus, tmp_path / "whole", **changes))
    broken = tmp_path / "broken"
    with subprocess.Popen([*command, *flags(corpus, broken, **changes)], env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as torchrun:
        wait_for(broken / "state" / "step-00000020.state", torchrun)
        kill_a_worker_of(torchrun)
        said, _ = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, said
    assert "resuming after step" in said
    assert rows_of(tmp_path / "whole") == rows_of(broken)
    first, second = params(tmp_path / "whole"), params(broken)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    # The restart of another torchrun does not take a used folder for its own.
    again = subprocess.run([*command, *flags(corpus, broken, **changes)], env=ENVIRONMENT, text=True,
                           capture_output=True, timeout=120)
    assert again.returncode != 0 and again.stderr.count("out: expected an empty or new folder") == 2


def test_extract_writes_each_file_once(corpus, tmp_path):
    def words(out):
        return ["-m", "gendistiller_ext", "extract", "--model", corpus[0], "--audio", corpus[1], "--out",
                tmp_path / out, "--quiet", "--json"]

    def counts(results):
        found = [json.loads(out) for _, out, _ in results]
        return {key: [count[key] for count in found] for key in ("written", "kept", "skipped")}
    run_alone(*words("one"))
    assert counts(run_ranks(2, *words("many"))) == {"written": [5, 4], "kept": [0, 0], "skipped": [0, 0]}
    names = sorted(os.listdir(tmp_path / "one"))
    assert len(names) == 9 and names == sorted(os.listdir(tmp_path / "many"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    for name in names[::3]:  # as if it had been stopped; and with another number of processes
        os.unlink(tmp_path / "many" / name)
    assert counts(run_ranks(3, *words("many"))) == {"written": [3, 0, 0], "kept": [0, 3, 3], "skipped": [0, 0, 0]}
    assert names == sorted(os.listdir(tmp_path / "many"))


# ---- Two hosts ---------------------------------------------------------------------------------------------

NAMESPACES = r"""
set -e
unshare -n sleep 300 & OTHER=$!
trap 'kill $OTHER' EXIT
while [ "$(readlink /proc/$OTHER/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add name gd0 type veth peer name gd1 netns $OTHER
ip addr add 10.9.0.1/24 dev gd0; ip link set gd0 up; ip link set lo up
nsenter -t $OTHER -n ip addr add 10.9.0.2/24 dev gd1
nsenter -t $OTHER -n ip link set gd1 up; nsenter -t $OTHER -n ip link set lo up
"$@"
"""
TWO_HOSTS = r"""
C="--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id 1 --rdzv-endpoint 10.9.0.1:29400"
GLOO_SOCKET_IFNAME=gd1 nsenter -t $OTHER -n "$@" $C --rdzv-conf is_host=0 --local-addr 10.9.0.2 $RUN --out $OUT/b & B=$!
GLOO_SOCKET_IFNAME=gd0 "$@" $C --rdzv-conf is_host=1 --local-addr 10.9.0.1 $RUN --out $OUT/a
wait $B
"""


def in_namespaces(script, arguments=(), environment=None, timeout=120):
    command = ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", NAMESPACES.replace('"$@"', script),
               "bash", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=timeout)


def why_no_namespaces():
    missing = [tool for tool in ("unshare", "nsenter", "ip", "bash") if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]}"
    done = in_namespaces("true", timeout=30)
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()[:200]}"


def test_two_hosts(corpus, tmp_path):
    reason = why_no_namespaces()
    if reason:
        pytest.skip(reason)
    words = flags(corpus, tmp_path / "whole")
    run_ranks(2, *words)
    at = words.index("--out")
    environment = {**ENVIRONMENT, "OUT": str(tmp_path), "RUN": " ".join(words[:at] + words[at + 2:])}
    done = in_namespaces(TWO_HOSTS, TORCHRUN, environment)
    assert done.returncode == 0, done.stderr
    written = [name for name in ("a", "b") if (tmp_path / name).exists()]
    assert len(written) == 1  # the rank is torchrun's choice
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / written[0])
    first, second = params(tmp_path / "whole"), params(tmp_path / written[0])
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
