"""The processes of a run that torchrun started: which one this is, and sums over all of them.

    torchrun --nproc-per-node 2 -m gendistiller_ext distill ...

torch.distributed is imported only where there is more than one process. They talk through gloo, over TCP; gradients
are summed by NCCL where each process has a CUDA device of its own and a PyTorch that can use it.
"""
from __future__ import annotations

import os
import re
import socket
import time
import uuid
from datetime import timedelta
from typing import Any, Mapping, Optional

import numpy as np

from ..atomic import replacing
from .data import Plan

LAUNCH = "launch"  # below OUT/state/: which torchrun began the run
DEVICE_SUMS = "nccl"  # torch.distributed's backend for sums of what is on devices


class ProcessLost(RuntimeError):
    """Another process of the run ended, or did not answer in time."""


class Processes:
    """One process, `rank` of `size`; the default is the only one, for which every method is trivial.

    local_size: how many of them share this machine. device: what this one computes on, 'cpu', 'cuda' or 'cuda:N'.
    launch: names the torchrun that started them, the same after its restarts; None without one. restarts: how often
    it restarted them.

    The methods are collective: all processes call them in the same order. They raise ProcessLost where
    another process has ended or has not come within the timeout.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1, timeout: float = 300.0,
                 launch: Optional[str] = None, restarts: int = 0, device: str = "cpu"):
        self.rank, self.size, self.local_size, self.timeout = rank, size, local_size, timeout
        self.launch, self.restarts, self.device = launch, restarts, device
        self._device_group = None  # the processes as DEVICE_SUMS connects them
        if size > 1:
            try:
                import torch.distributed as dist
            except ImportError as error:
                raise ImportError("more than one process needs torch: pip install 'gendistiller_ext[torch]' "
                                  f"({error})") from error
            self._dist = dist
            self._call(self._meet)
            self._connect_devices()

    def _meet(self) -> None:
        timeout = timedelta(seconds=self.timeout)
        store, _, _ = next(self._dist.rendezvous("env://", self.rank, self.size, timeout=timeout))
        store = self._dist.PrefixStore(self._agree(store, timeout), store)
        self._dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size,
                                      timeout=timeout)

    def _connect_devices(self) -> None:
        owned = self.gather(_summing_device(self.device))
        if None not in owned and len(set(owned)) == self.size:
            # A sum waits for its end, with the timeout: a lost process is an exception then, no abort of this one.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            self._device_group = self._call(self._dist.new_group, backend=DEVICE_SUMS,
                                            timeout=timedelta(seconds=self.timeout))

    def _agree(self, store, timeout: timedelta) -> str:
        """A prefix for keys that are of these processes alone: torchrun may keep its store over restarts, with
        the addresses of processes that are no more.

        The first process states a prefix; the others answer with a number of their own; the first one lists
        the numbers. Who finds its number there has not read what a former process left.
        """
        number = uuid.uuid4().hex
        if self.first:
            prefix = f"gendistiller/{number}"
            store.set("gendistiller/prefix", prefix)
            others = [f"{prefix}/{rank}" for rank in range(1, self.size)]
            store.wait(others, timeout)
            store.set(f"{prefix}/all", " ".join(store.get(key).decode() for key in others))
            return prefix
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if store.check(["gendistiller/prefix"]):
                prefix = store.get("gendistiller/prefix").decode()
                store.set(f"{prefix}/{self.rank}", number)
                if store.check([f"{prefix}/all"]) and number in store.get(f"{prefix}/all").decode().split():
                    return prefix
            time.sleep(0.02)
        raise RuntimeError("the first process did not come")

    @classmethod
    def from_environment(cls, timeout: float = 300.0, device: str = "cpu",
                         environment: Mapping[str, str] = os.environ) -> "Processes":
        """The processes that RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, as
        torchrun sets them; one process where they are absent. Waits until all are there. device: of all; see
        local_device()."""
        rank, size = rank_and_size(environment)
        launch = None
        if "TORCHELASTIC_RESTART_COUNT" in environment:
            launch = f"{socket.gethostname()} {_started(os.getppid())}"
        return cls(rank, size, int(environment.get("LOCAL_WORLD_SIZE", 1)), timeout, launch,
                   int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)), local_device(device, environment))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of a list: contiguous, of like size, the parts in rank order."""
        return items[len(items) * self.rank // self.size:len(items) * (self.rank + 1) // self.size]

    def add(self, array: np.ndarray) -> None:
        """array: contiguous float32 or float64. It becomes the sum over processes, the same bits in all."""
        if self.size == 1:
            return
        import torch
        tensor = torch.from_numpy(array)
        if self._device_group is None:
            self._call(self._dist.all_reduce, tensor)
        else:
            staged = tensor.to(self.device, copy=True)
            self._call(self._dist.all_reduce, staged, group=self._device_group)
            tensor.copy_(staged)

    def gather(self, value: Any) -> list:
        """Every process's value, in rank order."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        self._call(self._dist.all_gather_object, values, value)
        return values

    def spread(self, value: Any) -> Any:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        self._call(self._dist.broadcast_object_list, values, src=0)
        return values[0]

    def close(self) -> None:
        if self.size > 1 and self._dist.is_initialized():
            self._dist.destroy_process_group()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _call(self, function, *args, **options) -> Any:
        try:
            return function(*args, **options)
        except RuntimeError as error:
            # "[file:line] Connection closed by peer [address]. Advice."
            reason = re.sub(r"\[/[^]]*\]\s*", "", " ".join(str(error).split())).split(". ")[0]
            raise ProcessLost(f"process {self.rank} of {self.size}: another process of the run has ended, or "
                              f"did not answer for {self.timeout:g} s ({reason})") from error


class SharedPlan:
    """A plan of which each process sees its share of every batch."""

    def __init__(self, plan: Plan, processes: Processes):
        self._plan, self._processes = plan, processes

    def __getitem__(self, batch: int) -> list[tuple[int, int]]:
        return self._processes.share(self._plan[batch])

    def epoch(self, batch: int) -> float:
        return self._plan.epoch(batch)


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(RANK, WORLD_SIZE); (0, 1) where they are absent. Raises ValueError where they are no such numbers."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return 0, 1
    words = environment["RANK"], environment["WORLD_SIZE"]
    try:
        rank, size = map(int, words)
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise ValueError("RANK, WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE in the environment, got "
                         f"{words[0]} and {words[1]}")
    return rank, size


def local_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """What this process computes on: where several share a machine and `device` is 'cuda', the one of its LOCAL_RANK;
    else `device`."""
    shared = device == "cuda" and int(environment.get("LOCAL_WORLD_SIZE", 1)) > 1
    return f"cuda:{environment.get('LOCAL_RANK', 0)}" if shared else device


def _summing_device(device: str) -> Optional[str]:
    """Names a CUDA device that DEVICE_SUMS can use, among those of all machines; None for any other, and where there
    is no such device, which the engine tells."""
    import torch
    if not device.startswith("cuda") or not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    try:
        return str(torch.cuda.get_device_properties(device).uuid)
    except (AssertionError, RuntimeError):
        return None


def _started(pid: int) -> str:
    """A process by its number and, where /proc tells, when it started: numbers are used again."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            return f"{pid} {stream.read().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return str(pid)


def was_launched_by(out: str, processes: Processes) -> bool:
    """Whether the run in `out` was begun by the torchrun that restarted this process: it goes on with it."""
    if not processes.launch or not processes.restarts:
        return False
    try:
        with open(os.path.join(out, "state", LAUNCH), encoding="utf-8") as stream:
            return stream.read() == processes.launch
    except FileNotFoundError:
        return False


def note_launch(out: str, processes: Processes) -> None:
    """Leaves this launch's name in `out`, for was_launched_by()."""
    if processes.launch:
        with replacing(os.path.join(out, "state", LAUNCH)) as stream:
            stream.write(processes.launch.encode())
