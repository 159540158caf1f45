"""Engines that misbehave, for tests of the benchmarks: run as a file this is their worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

import gendistiller_ext as gd  # noqa: E402
from conftest import SMALL  # noqa: E402

import measures  # noqa: E402
import peers  # noqa: E402
import trainers  # noqa: E402

FOREVER = 60


def hang() -> None:
    """In a program that it starts, once it has said so in the log."""
    print("hanging", flush=True)
    subprocess.run([sys.executable, "-c", f"import time; time.sleep({FOREVER})"], check=True)


class Honest(peers.Ours):
    package = "fake"


class Slow(Honest):
    def run(self):
        time.sleep(0.2)
        return super().run()


class Hangs(Honest):
    """On more than a second of audio."""

    def run(self):
        if self.wavs.shape[1] > 16000:
            hang()
        return super().run()


class HangsLater(Honest):
    """In the first timed pass: the third."""

    runs = 0

    def run(self):
        self.runs += 1
        if self.runs == 3:
            hang()
        return super().run()


class Crashes(Honest):
    def run(self):
        os._exit(3)


class Prints(Honest):
    def run(self):
        print('{"error": "not an answer", "kind": "Failed"}', flush=True)
        os.write(1, b"noise\n")
        return super().run()


class Wrong(Honest):
    def run(self):
        return [state + 1e-2 for state in super().run()]


class Raises(Honest):
    def run(self):
        raise MemoryError("no room")


class Missing(Honest):
    def __init__(self, *_):
        import a_package_that_is_not_there  # noqa: F401


class Int8(Honest):
    precision = "int8"


ENGINES = {"gendistiller": peers.Ours, "Honest": Honest, "Slow": Slow, "Hangs": Hangs, "Hangs later": HangsLater,
           "Crashes": Crashes, "Prints": Prints, "Wrong": Wrong, "Raises": Raises, "Missing": Missing,
           "Fake int8": Int8}


class Trainer:
    """A step of nothing, in so many seconds."""

    precision = "float32"
    seconds = 0.0

    def __init__(self, *_):
        self.steps = 0

    def take(self, wavs):
        pass

    prepare = take

    def run(self):
        self.steps += 1
        time.sleep(self.seconds)
        return [1.0]


class SlowTrainer(Trainer):
    seconds = 0.2


class HangingTrainer(Trainer):
    def run(self):
        time.sleep(FOREVER if self.steps == 3 else 0)
        return super().run()


TRAINERS = {"gendistiller": Trainer, "Slow": SlowTrainer, "Hangs": HangingTrainer, "Missing": Missing}


def library_gemm(library, precision, threads, m, k, n):
    return (lambda: time.sleep(FOREVER if precision == "int8" else 0.05)), f"{library}: fake"


def make_checkpoint(folder, preset):
    """A small model under the name of any."""
    model = gd.Model(gd.Config(**SMALL), seed=0)
    model.save(peers.checkpoint(folder, preset))
    return model.config


def install() -> None:
    for table, fakes in ((peers.PEERS, ENGINES), (trainers.TRAINERS, TRAINERS)):
        table.clear()
        table.update(fakes)
    measures.library_gemm = library_gemm


if __name__ == "__main__":
    import serve
    import worker

    install()
    serve.serve(worker.Worker())
