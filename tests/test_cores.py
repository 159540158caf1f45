"""How many cores are this process's: csrc/cores.c on trees of files as Linux has them, on this machine, in a real
cgroup, and under torchrun."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gendistiller_ext import Config, Model, _core

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(_core.__file__).resolve().parent.parent  # where the package under test lies
HERE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(not HERE, reason="needs sched_getaffinity")
V2 = "30 20 0:26 {top} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 20 0:29 {top} {point} rw,nosuid - cgroup cgroup rw,{controllers}"
ROOT_MOUNT = "20 1 8:1 / / rw - ext4 /dev/sda1 rw"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """cores.c by itself."""
    target = tmp_path_factory.mktemp("cores") / "cores.so"
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror",
                    "-shared", "-fPIC", ROOT / "csrc" / "cores.c", "-o", target], check=True)
    return ctypes.CDLL(str(target))


class Tree:
    """A folder that stands for /."""

    def __init__(self, library: ctypes.CDLL, root: Path) -> None:
        self.library, self.root = library, root

    def write(self, path: str, text: str | bytes) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())

    def cgroup(self, lines: str, *mounts: str) -> None:
        self.write("/proc/self/cgroup", lines + "\n")
        self.write("/proc/self/mountinfo", "\n".join((ROOT_MOUNT, *mounts)) + "\n")

    def process(self, pid: int, parent: int, mask: str, name: str = "python", itself: bool = False) -> None:
        for folder in [f"/proc/{pid}", *(["/proc/self"] if itself else [])]:
            self.write(f"{folder}/stat", f"{pid} ({name}) S {parent} {pid} 1 0 -1 4194304")
            self.write(f"{folder}/status", f"Name:\t{name}\nPPid:\t{parent}\nCpus_allowed:\t{mask}\n"
                                           "Cpus_allowed_list:\t0\nMems_allowed:\t1\n")

    def cores(self, local: str | None = None) -> int:
        return self.library.gd_usable_cores_below(os.fsencode(self.root), None if local is None else local.encode())


@pytest.fixture
def tree(library: ctypes.CDLL, tmp_path: Path) -> Tree:
    """A tree on a machine of as many processors as this process may run on, two of them at least."""
    if len(HERE) < 2:
        pytest.skip("one processor: nothing could limit it")
    return Tree(library, tmp_path)


def test_without_files_the_mask_counts(tree):
    assert tree.cores() == len(HERE)


@pytest.mark.parametrize("text, cores", [
    ("max 100000\n", None), ("100000 100000\n", 1), ("50000 100000\n", 1), ("1 1000000\n", 1), ("100001 100000\n", 2),
    ("150000 100000", 2), ("9223372036854775807 100000\n", None), ("99999999999999999999999 1\n", None),
    ("9223372036854775806 1\n", None), ("0 100000\n", None), ("-1 100000\n", None), ("100000 0\n", None),
    ("100000\n", None), ("100000max 100000\n", None), ("", None), ("\n", None), ("garbage", None),
    (b"\xff\x00\x01", None), ("100000 100000 7\n", 1),
])
def test_version_2(tree, text, cores):
    tree.cgroup("0::/user.slice/job", V2.format(top="/", point="/sys/fs/cgroup"))
    tree.write("/sys/fs/cgroup/user.slice/job/cpu.max", text)
    assert tree.cores() == (cores or len(HERE))


@pytest.mark.parametrize("quota, period, cores", [
    ("-1\n", "100000\n", None), ("100000\n", "100000\n", 1), ("110000\n", "100000\n", 2), ("1000\n", "100000\n", 1),
    ("100000\n", "garbage\n", None), ("100000\n", None, None), (None, "100000\n", None), ("x", "100000", None),
])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_version_1(tree, quota, period, cores, controllers):
    tree.cgroup(f"11:memory:/elsewhere\n4:{controllers}:/batch/7\n3:cpuset:/other\n1:name=systemd:/init.scope",
                V1.format(top="/", point="/sys/fs/cgroup/memory", controllers="memory"),
                V1.format(top="/", point="/sys/fs/cgroup/cpu", controllers=controllers),
                V1.format(top="/", point="/sys/fs/cgroup/cpuset", controllers="cpuset"))
    for name, text in (("cpu.cfs_quota_us", quota), ("cpu.cfs_period_us", period)):
        if text is not None:
            tree.write(f"/sys/fs/cgroup/cpu/batch/7/{name}", text)
    for other in ("memory/elsewhere", "cpuset/other", "cpuset/batch/7"):
        tree.write(f"/sys/fs/cgroup/{other}/cpu.cfs_quota_us", "1000")
        tree.write(f"/sys/fs/cgroup/{other}/cpu.cfs_period_us", "100000")
    assert tree.cores() == (cores or len(HERE))


@pytest.mark.parametrize("limited", ["", "/a.slice", "/a.slice/b", "/a.slice/b/c.scope"])
def test_every_cgroup_around_it_counts(tree, limited):
    """And none beside it."""
    tree.cgroup("0::/a.slice/b/c.scope", V2.format(top="/", point="/sys/fs/cgroup"))
    for path in ("/a.slice", "/a.slice/b", "/a.slice/b/c.scope"):
        tree.write(f"/sys/fs/cgroup{path}/cpu.max", "max 100000\n")
    for path in ("/a.slice/other", "/a", "/a.slice/b/c.scope/below", "/.."):
        tree.write(f"/sys/fs/cgroup{path}/cpu.max", "100000 100000\n")
    assert tree.cores() == len(HERE)
    tree.write(f"/sys/fs/cgroup{limited}/cpu.max", "100000 100000\n")
    assert tree.cores() == 1


def test_both_versions_at_once(tree):
    tree.cgroup("2:cpu:/x\n0::/y", V1.format(top="/", point="/sys/fs/cgroup/cpu", controllers="cpu"),
                V2.format(top="/", point="/sys/fs/cgroup/unified"))
    tree.write("/sys/fs/cgroup/unified/y/cpu.max", "max 100000")
    tree.write("/sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "50000")
    tree.write("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1")
    assert tree.cores() == len(HERE)
    tree.write("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000")
    assert tree.cores() == 1
    tree.write("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1")
    tree.write("/sys/fs/cgroup/unified/y/cpu.max", "50000 50000")
    assert tree.cores() == 1


@pytest.mark.parametrize("cgroup, top, file", [
    ("/", "/", ""),                                   # a namespace of its own, mounted in it
    ("/docker/12ab", "/docker/12ab", ""),             # the host's names, only this part mounted
    ("/docker/12ab/worker", "/docker/12ab", "/worker"),
    ("/docker/12ab/worker", "/docker/12ab", ""),
    ("/docker/12ab", "/", ""),                        # the host's names, in a namespace's mount
    ("/", "/docker/12ab", ""),                        # the namespace's names, the host's mount
    ("/", "/../..", ""),
    ("/../../other", "/", ""),                        # it was moved out of the namespace
    ("/docker/12ab", "/docker/12", ""),
])
def test_containers(tree, cgroup, top, file):
    tree.cgroup(f"0::{cgroup}", V2.format(top=top, point="/sys/fs/cgroup"))
    assert tree.cores() == len(HERE)
    tree.write(f"/sys/fs/cgroup{file}/cpu.max", "100000 100000\n")
    assert tree.cores() == 1


def test_a_mount_that_has_the_path_goes_before_one_that_has_not(tree):
    tree.cgroup("0::/", V2.format(top="/../node", point="/host/cgroup"), V2.format(top="/", point="/sys/fs/cgroup"))
    tree.write("/host/cgroup/cpu.max", "100000 100000\n")
    assert tree.cores() == len(HERE)


def test_names_with_spaces(tree):
    tree.cgroup("0::/my job", V2.format(top="/", point="/sys/fs/c\\040group"))
    tree.write("/sys/fs/c group/my job/cpu.max", "100000 100000\n")
    assert tree.cores() == 1


@pytest.mark.parametrize("cgroup, mountinfo", [
    (b"", b""), (b"0::", b"x - cgroup2"), (b"\n::\n:::::", b" - - - \n - cgroup2 \n"), (b"0::/a", b"1 - cgroup2 a b\n"),
    (b"0::relative", b"30 20 0:26 / relative rw - cgroup2 cgroup2 rw\n"), (b"\xff" * 9000, b"\x00\xff" * 9000),
    (b"0::/" + b"a" * 9000, b"30 20 0:26 / /" + b"b" * 9000 + b" rw - cgroup2 cgroup2 rw\n"),
    (b"4:cpu:/" + b"../" * 900, b"31 20 0:29 / /x rw - cgroup cgroup " + b"rw," * 900 + b"cpu\n"),
])
def test_odd_files_limit_nothing(tree, cgroup, mountinfo):
    tree.write("/proc/self/cgroup", cgroup)
    tree.write("/proc/self/mountinfo", mountinfo)
    assert tree.cores() == len(HERE)


def test_a_folder_in_a_file_s_place_limits_nothing(tree):
    tree.cgroup("0::/", V2.format(top="/", point="/sys/fs/cgroup"))
    (tree.root / "sys/fs/cgroup/cpu.max").mkdir(parents=True)
    assert tree.cores() == len(HERE)


# ---- Several processes of a machine ------------------------------------------------------------------------

def mask_of(processors: list[int]) -> str:
    """As /proc/PID/status has it: 32 bits a word, the highest first."""
    bits = sum(1 << processor for processor in processors)
    return ",".join(f"{bits >> 32 * i & 0xffffffff:08x}" for i in reversed(range(bits.bit_length() // 32 + 2)))


def test_processes_share_the_cores(tree):
    assert [tree.cores(local) for local in ("1", "2", str(len(HERE)), "1000000")] == [len(HERE), len(HERE) // 2, 1, 1]
    assert tree.cores("99999999999999999999") == 1
    assert [tree.cores(odd) for odd in ("", "0", "-2", "two", "2x")] == [len(HERE)] * 5


def test_processes_that_are_bound_apart_have_their_masks(tree):
    """Processes with one parent: as Slurm's tasks, or torchrun's under numactl."""
    rest = [900, 901]
    tree.process(70, 60, mask_of(HERE), itself=True)
    assert tree.cores("2") == len(HERE) // 2  # the other is not there yet
    tree.process(71, 60, mask_of(HERE), name="a) S (b")
    assert tree.cores("2") == len(HERE) // 2
    tree.process(71, 60, mask_of([*HERE[:1], *rest]))  # they have a processor in common
    assert tree.cores("2") == len(HERE) // 2
    tree.process(71, 60, mask_of(rest))
    assert tree.cores("2") == len(HERE)
    tree.process(71, 61, mask_of(rest))  # another's child
    assert tree.cores("2") == len(HERE) // 2
    tree.process(71, 60, "")
    assert tree.cores("2") == len(HERE) // 2
    for pid in range(71, 79):  # more than LOCAL_WORLD_SIZE says
        tree.process(pid, 60, mask_of(rest))
    assert tree.cores("2") == len(HERE)


def test_two_to_a_socket(tree):
    """Four processes, bound by twos."""
    tree.process(70, 60, mask_of(HERE), itself=True)
    tree.process(71, 60, mask_of(HERE))
    for pid in (72, 73):
        tree.process(pid, 60, mask_of([900, 901]))
    assert tree.cores("4") == len(HERE) // 2


def test_a_quota_is_shared_whatever_the_masks_are(tree):
    tree.process(70, 60, mask_of(HERE), itself=True)
    tree.process(71, 60, mask_of([900]))
    tree.cgroup("0::/", V2.format(top="/", point="/sys/fs/cgroup"))
    tree.write("/sys/fs/cgroup/cpu.max", "200000 100000\n")
    assert [tree.cores(), tree.cores("2")] == [2, 1]


# ---- This machine ------------------------------------------------------------------------------------------

TELL = """
import gendistiller_ext as gd, os
from gendistiller_ext import _core
print(_core.usable_cores())
"""


def tell(before: str = "", **environment: str) -> int:
    others = {name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"}
    done = subprocess.run([sys.executable, "-c", before + TELL], cwd=PACKAGE, capture_output=True, text=True,
                          check=True, env={**others, **environment})
    return int(done.stdout)


def test_the_module_tells_it(tree):
    here = tell()
    assert 1 <= here <= len(HERE)
    assert tell(f"import os; os.sched_setaffinity(0, {{{HERE[0]}}})") == 1
    assert tell(LOCAL_WORLD_SIZE="2") == max(1, here // 2)


def test_children_that_bind_themselves(tree):
    """Two processes that say they are of one run share the same processors; each on its own has that."""
    script = ("import os, sys\nmine = {masks}[int(sys.argv[1])]\nos.sched_setaffinity(0, mine)\n"
              "print(flush=True)\nsys.stdin.readline()" + TELL + "sys.stdout.flush()\nsys.stdin.readline()\n")
    for masks, cores in (([{*HERE[:2]}] * 2, 1), ([{HERE[0]}, {HERE[1]}], 1),
                         *([([{*HERE[:2]}, {*HERE[2:4]}], 2)] if len(HERE) > 3 else [])):
        both = [subprocess.Popen([sys.executable, "-c", script.format(masks=masks), str(i)], cwd=PACKAGE, text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 env={**os.environ, "LOCAL_WORLD_SIZE": "2"}) for i in range(2)]
        for process in both:  # all are bound before one asks
            process.stdout.readline()
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        got = [int(process.stdout.readline()) for process in both]
        for process in both:
            process.communicate("\n")
        assert got == [min(cores, tell())] * 2


def test_a_model_has_as_many_threads(tree):
    script = f"""
import os, numpy as np, gendistiller_ext as gd
from gendistiller_ext import _core
model = gd.Model(gd.Config(**{dict(encoder_embed_dim=12, encoder_ffn_embed_dim=20, encoder_attention_heads=3,
                                   conv_pos=8, conv_pos_groups=2)!r}))
before = len(os.listdir("/proc/self/task"))
model.forward(np.zeros((2, 8000), np.float32))
assert len(os.listdir("/proc/self/task")) - before == _core.usable_cores() - 1
"""
    assert tell(script) == tell()
    assert tell(script, LOCAL_WORLD_SIZE=str(len(HERE))) == 1


@pytest.fixture
def real_cgroup():
    """A function that makes a cgroup with a quota of one core for a shell's command to enter."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    mounts = [(words[4], fields.split()) for words, fields in ((line.split(), line.split(" - ")[1]) for line in lines)]
    point = next((point for point, (kind, _, options) in mounts
                  if kind == "cgroup" and "cpu" in options.split(",")), None)
    version = 1 if point else 2
    if not point:
        point = next((point for point, (kind, *_) in mounts if kind == "cgroup2"), None)
    if not point:
        pytest.skip("no cgroup with a quota is mounted")
    folder = Path(point) / f"gendistiller-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no right to make a cgroup: {error}")
    inner = folder / "inner"
    try:
        if version == 1:
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text("100000")
        else:
            (folder / "cpu.max").write_text("100000 100000")
        inner.mkdir()
        yield inner
    except OSError as error:
        pytest.skip(f"no right to set a quota: {error}")
    finally:
        for made in (inner, folder):
            if made.exists():
                made.rmdir()


def test_a_real_quota(tree, real_cgroup):
    """Of the cgroup around the process's own."""
    assert tell(f"open('{real_cgroup}/cgroup.procs', 'w').write('0');") == 1
