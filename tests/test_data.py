"""Batches: order, crops and held-out files are functions of the seed alone; reading ahead keeps order."""
import threading
import time

import numpy as np
import pytest

from gendistiller_ext.audio.files import AudioFile
from gendistiller_ext.training.data import (POOL_BATCHES, BatchPlan, ReadAhead, TrainingData, crop_position,
                                            dataset_hash, length_batches, philox_words, read_files, shuffled,
                                            split_validation)


def test_philox_words_are_the_published_generator():
    """Philox 4x64-10's known answers (Random123, kat_vectors): NumPy increments the counter before each block,
    so that counter 0's words come after counter -1."""
    key = np.array([0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=np.full(4, 2 ** 64 - 1, np.uint64)).random_raw(4)
    assert [hex(int(word)) for word in words] == ["0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b",
                                                  "0x7e68b68aec7ba23b"]
    assert philox_words(1, 2, 3, 4).dtype == np.uint64


def test_words_differ_in_every_argument():
    base = (1, 2, 3, 4)
    first = {int(philox_words(*base)[0])}
    for position in range(4):
        changed = list(base)
        changed[position] += 1
        first.add(int(philox_words(*changed)[0]))
    assert len(first) == 5


def test_permutations_and_positions():
    order = shuffled(7, 1, 0, 100)
    assert sorted(order) == list(range(100)) and list(order) != list(range(100))
    assert list(order) == list(shuffled(7, 1, 0, 100)) and list(order) != list(shuffled(7, 1, 1, 100))
    positions = np.array([crop_position(7, epoch, 3) for epoch in range(2000)])
    assert positions.min() >= 0 and positions.max() < 1
    assert abs(positions.mean() - 0.5) < 0.03 and abs(positions.std() - 12 ** -0.5) < 0.02


def test_orders_and_positions_are_those_of_every_version():
    """A state goes on with the batches that the version which saved it would have had."""
    plan = BatchPlan(list(range(500, 700)), 4, 10 ** 6, seed=7)
    assert [[utterance for _, utterance in plan[batch]] for batch in range(2)] == [[28, 35, 37, 44], [75, 77, 78, 80]]
    assert crop_position(7, 3, 5) == 0.20868166048383907


def test_every_epoch_has_every_utterance_once():
    count, size = 24, 3
    plan = BatchPlan([1000 + i for i in range(count)], size, 10 ** 6, seed=1)
    batches = POOL_BATCHES * 5  # a whole number of epochs and of pools
    entries = [entry for batch in range(batches) for entry in plan[batch]]
    assert all(len(plan[batch]) == size for batch in range(batches))
    for epoch in range(batches * size // count):
        assert sorted(utterance for e, utterance in entries if e == epoch) == list(range(count))


def test_a_batch_has_like_lengths_but_order_is_random():
    lengths = np.random.default_rng(0).integers(1000, 200000, 960)
    plan = BatchPlan(list(lengths), 4, 10 ** 6, seed=0)
    spread = [np.ptp([lengths[u] for _, u in plan[b]]) for b in range(POOL_BATCHES)]
    shuffled_spread = [np.ptp(lengths[4 * b:4 * b + 4]) for b in range(POOL_BATCHES)]
    assert np.mean(spread) < np.mean(shuffled_spread) / 4
    means = [np.mean([lengths[u] for _, u in plan[b]]) for b in range(POOL_BATCHES)]
    assert means != sorted(means)


def test_plan_follows_from_the_seed_and_starts_anywhere():
    lengths = list(range(500, 600))
    whole = [BatchPlan(lengths, 8, 550, seed=3)[b] for b in range(40)]
    late = BatchPlan(lengths, 8, 550, seed=3)
    assert [late[b] for b in range(39, -1, -1)] == whole[::-1]
    assert [BatchPlan(lengths, 8, 550, seed=4)[b] for b in range(40)] != whole


def test_more_batch_than_files():
    plan = BatchPlan([500, 600], 8, 1000, seed=0)
    epochs = [epoch for epoch, _ in plan[0]]
    assert len(plan[0]) == 8 and len(set(plan[0])) == 8 and len(set(epochs)) > 1


def files(count):
    return [AudioFile(f"speaker/{i:04d}.wav", f"/none/{i}", 1000 + i) for i in range(count)]


def test_held_out_files_follow_from_their_names():
    train, held = split_validation(files(2000), 0.05)
    assert abs(len(held) - 100) < 35 and len(train) + len(held) == 2000
    more_train, more_held = split_validation(files(3000), 0.05)
    assert set(held) <= set(more_held) and set(train) <= set(more_train)
    moved = [AudioFile(file.name, "/elsewhere" + file.path, file.samples) for file in files(2000)]
    assert [file.name for file in split_validation(moved, 0.05)[1]] == [file.name for file in held]


@pytest.mark.parametrize("count,fraction,expected", [(10, 0.0, 0), (10, 1e-9, 1), (10, 0.9999999, 9), (1, 0.5, 0)])
def test_held_out_at_the_edges(count, fraction, expected):
    train, held = split_validation(files(count), fraction)
    assert len(held) == expected and len(train) == count - expected


def test_bad_fraction():
    with pytest.raises(ValueError, match="valid_fraction: expected 0 <= fraction < 1, got 1.5"):
        split_validation(files(3), 1.5)


def test_dataset_hash_sees_names_lengths_and_order():
    base = files(5)
    assert dataset_hash(base) == dataset_hash(files(5))
    renamed = [AudioFile("x", base[0].path, base[0].samples)] + base[1:]
    longer = [AudioFile(base[0].name, base[0].path, 1)] + base[1:]
    assert len({dataset_hash(s) for s in (base, base[::-1], base[:-1], renamed, longer)}) == 5


def test_length_batches_hold_all_longest_first():
    batches = length_batches(files(10), 4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [file.samples for batch in batches for file in batch] == list(range(1009, 999, -1))


class TestReadAhead:
    def test_order_is_kept(self):
        def load(item):
            time.sleep(0.002 * (item % 3))
            return item * item
        with ReadAhead(load, iter(range(30)), threads=4, ahead=6) as results:
            assert list(results) == [i * i for i in range(30)]

    def test_at_most_ahead_results_wait(self):
        started = []
        with ReadAhead(lambda item: started.append(item) or item, iter(range(100)), threads=2, ahead=3) as results:
            next(results)
            time.sleep(0.1)
            assert len(started) <= 4

    def test_errors_come_in_their_place(self):
        def load(item):
            if item == 2:
                raise OSError("disk on fire")
            return item
        with ReadAhead(load, iter(range(5)), threads=3) as results:
            assert [next(results), next(results)] == [0, 1]
            with pytest.raises(OSError, match="disk on fire"):
                next(results)

    def test_leaving_stops_the_threads(self):
        before = threading.active_count()
        started = []

        def load(item):
            started.append(item)
            time.sleep(0.02)
            return item
        with ReadAhead(load, iter(range(10 ** 9)), threads=3, ahead=8) as results:
            next(results)
        done = len(started)
        assert threading.active_count() == before
        time.sleep(0.1)
        assert len(started) == done <= 12


@pytest.fixture
def corpus(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    rng = np.random.default_rng(0)
    found = []
    for i in range(7):
        wav = rng.uniform(-0.5, 0.5, 3000 + 500 * i).astype(np.float32)
        path = str(tmp_path / f"{i}.wav")
        soundfile.write(path, wav, 16000, subtype="FLOAT")
        found.append(AudioFile(f"{i}.wav", path, len(wav)))
    return found


def collect(data, start, stop, threads):
    with data.batches(start, stop, threads=threads) as batches:
        return list(batches)


def test_batches_do_not_depend_on_threads_or_the_start(corpus):
    data = TrainingData(corpus, batch_size=3, crop=3500, seed=5)
    whole = collect(data, 0, 20, 1)
    assert [batch.number for batch in whole] == list(range(20))
    for start, threads in ((0, 4), (11, 2)):
        for batch, expected in zip(collect(TrainingData(corpus, 3, 3500, 5), start, 20, threads), whole[start:]):
            assert batch.names == expected.names
            assert all(np.array_equal(a, b) for a, b in zip(batch.wavs, expected.wavs))
    assert max(len(wav) for batch in whole for wav in batch.wavs) == 3500
    seven = [batch.wavs[i] for batch in whole for i, name in enumerate(batch.names) if name == "6.wav"]
    assert len({wav[:10].tobytes() for wav in seven}) > 1, "the crop should move from epoch to epoch"


def test_files_that_fail_are_left_out_and_named(corpus):
    open(corpus[2].path, "wb").close()
    data = TrainingData(corpus, batch_size=7, crop=10000, seed=0)
    batch = collect(data, 0, 1, 2)[0]
    assert {error.name for error in batch.failed} <= {"2.wav"}
    assert len(batch.wavs) == len(batch.names) == 7 - len(batch.failed)
    both = read_files(corpus[1:4], crop=1000, min_samples=1000)
    assert both.names == ["1.wav", "3.wav"] and [len(wav) for wav in both.wavs] == [1000, 1000]
    assert both.seconds == 2000 / 16000
    assert read_files(corpus[:1], min_samples=10 ** 6).failed[0].reason.startswith("too short")


def test_no_files():
    with pytest.raises(ValueError, match="audio: expected at least one"):
        TrainingData([], 4, 1000, 0)
