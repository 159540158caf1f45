"""The pickle reader: the same data as pickle's, and nothing a file names is ever run."""

from __future__ import annotations

import collections
import os
import pickle
import random
import struct

import pytest

from gendistiller_ext.checkpoints.inert_pickle import Global, Opaque, dictionary, loads

CALLS: list = []


def boom(*args, **kwargs):
    CALLS.append((args, kwargs))


class Bomb:
    """Runs `boom` when made, built or called."""

    def __new__(cls, *args, **kwargs):
        CALLS.append("new")
        return super().__new__(cls)

    def __init__(self, *args):
        CALLS.append("init")

    def __setstate__(self, state):
        CALLS.append("setstate")

    def __call__(self, *args):
        CALLS.append("call")


class Reduced:
    def __init__(self, function, args, *more):
        self.value = (function, args, *more)

    def __reduce__(self):
        return self.value


class Keywords:
    def __getnewargs_ex__(self):
        return (1,), {"two": 2}


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, tmp_path):
    """Every test of this file fails if its pickles make anything run."""
    CALLS.clear()
    monkeypatch.chdir(tmp_path)
    yield
    assert CALLS == []
    assert os.listdir(tmp_path) == []


def nested(random_: random.Random, depth: int):
    if depth == 0 or random_.random() < 0.3:
        return random_.choice([None, True, False, 0, 1, -1, 255, 256, 65535, 65536, -(1 << 31), 1 << 62,
                               -(1 << 200),
                               0.5, -1e300, float("inf"), "", "a", "\u00e9\u4e2d\U0001f600", "x" * 300,
                               "\ud800",
                               b"", b"\x00\xff", b"y" * 300])
    kind = random_.randrange(6)
    items = [nested(random_, depth - 1) for _ in range(random_.randrange(5))]
    if kind == 0:
        return items
    if kind == 1:
        return tuple(items)
    if kind == 2:
        return {random_.choice(["k", 3, (1, "a"), b"b", None, 2.5]): item for item in items}
    if kind == 3:
        return {random_.randrange(10) for _ in items}
    if kind == 4:
        return frozenset(str(random_.randrange(10)) for _ in items)
    return [items, items]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("seed", range(20))
def test_plain_data_as_pickle_reads_it(seed, protocol):
    random_ = random.Random(seed)
    value = [nested(random_, 5) for _ in range(20)]
    if protocol == 3:  # sets are made by a call there
        value = [item for item in value if b"set\n" not in pickle.dumps(item, 3)]
    data = pickle.dumps(value, protocol)
    assert repr(loads(data)) == repr(pickle.loads(data))


def test_protocol_2_and_shared_and_cyclic_objects():
    shared = ["s"]
    value = {"a": shared, "b": shared, "t": (shared, 1), "n": 10 ** 30, "f": 1.5, "big": list(range(5000))}
    value["self"] = value
    result = loads(pickle.dumps(value, 2))
    assert result["a"] is result["b"] is result["t"][0] and result["self"] is result
    assert result["n"] == 10 ** 30 and result["big"] == list(range(5000))
    cyclic = []
    cyclic.append((cyclic,))
    assert (found := loads(pickle.dumps(cyclic, 2)))[0][0] is found


def test_python_2_strings():
    assert loads(b"\x80\x02U\x03ab\xe9T\x04\x00\x00\x00abcd\x86.") == ("ab\xe9", "abcd")


def test_ordered_dict_is_known_only_where_asked():
    value = collections.OrderedDict(b=1, a=2)
    value.attribute = "dropped"
    data = pickle.dumps(value, 2)
    known = loads(data, {"collections.OrderedDict": dictionary})
    assert list(known.items()) == [("b", 1), ("a", 2)]
    unknown = loads(data)
    assert isinstance(unknown, Opaque) and unknown.name == "collections.OrderedDict"
    assert unknown.items == [("b", 1), ("a", 2)] and unknown.state == {"attribute": "dropped"}
    assert dictionary([["k", 1]]) == {"k": 1} == dictionary({"k": 1})
    for wrong in ([1], ([["k"]],), ([[[], 1]],), ({}, {})):
        with pytest.raises(ValueError):
            dictionary(*wrong) if isinstance(wrong, tuple) else dictionary(wrong)


HERE = __name__
EVIL = {
    "reduce": lambda p: pickle.dumps(Reduced(os.system, ("touch ran",)), p),
    "reduce eval": lambda p: pickle.dumps(Reduced(eval, ("open('ran', 'w')",)), p),
    "reduce ours": lambda p: pickle.dumps(Reduced(boom, (1,)), p),
    "reduce with state and items": lambda p: pickle.dumps(
        Reduced(boom, (), {"state": 1}, iter([1, 2]), iter([("k", "v")])), p),
    "reduce in arguments": lambda p: pickle.dumps(Reduced(dict, (Reduced(boom, ()),)), p),
    "new object": lambda p: b"\x80\x02c" + f"{HERE}\nBomb\n".encode() + b")\x81}b.",
    "new object of a function": lambda p: b"\x80\x02cposix\nsystem\nX\x09\x00\x00\x00touch ran\x85\x81.",
    "build": lambda p: b"\x80\x02c" + f"{HERE}\nBomb\n".encode() + b")R}X\x01\x00\x00\x00ac" +
                       f"{HERE}\nboom\n".encode() + b"sb.",
    "attribute chain": lambda p: b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93\x8c\x09touch ran\x85R.",
    "called result": lambda p: b"\x80\x02c" + f"{HERE}\nBomb\n".encode() + b")R)R.",
    "keywords": lambda p: pickle.dumps(Keywords(), 4),
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_calls_are_recorded_not_made(name, protocol):
    CALLS.clear()
    data = EVIL[name](protocol)
    CALLS.clear()
    assert isinstance(loads(data), Opaque)


def test_pickle_itself_would_run_them(tmp_path):
    for name in ("reduce", "reduce eval", "attribute chain"):
        pickle.loads(EVIL[name](2))
        os.remove(tmp_path / "ran")
    with pytest.raises(TypeError):
        pickle.loads(EVIL["reduce in arguments"](2))
    pickle.loads(EVIL["build"](2))
    assert CALLS == [((), {}), "new", "init", "setstate"]
    CALLS.clear()


def test_what_is_recorded():
    value = loads(pickle.dumps(Reduced(boom, (1, "a"), {"s": 2}, iter([3]), iter([("k", 4)])), 2))
    assert value.name == f"{HERE}.boom" and value.args == (1, "a") and value.state == {"s": 2}
    assert value.items == [3, ("k", 4)]
    assert repr(value) == f"Opaque('{HERE}.boom')"
    function = loads(pickle.dumps(boom, 4))
    assert isinstance(function, Global) and function.name == f"{HERE}.boom"
    assert loads(pickle.dumps(Keywords(), 4)).args == ((1,), {"two": 2})


@pytest.mark.parametrize("data, message", [
    (b"(S'touch ran'\nios\nsystem\n.", "opcode 0x53 is not read"),  # INST
    (b"(ios\nsystem\n.", "opcode 0x69 is not read"),
    (b"(cos\nsystem\nX\x09\x00\x00\x00touch rano.", "opcode 0x6f is not read"),  # OBJ
    (b"\x80\x02\x82\x01.", "opcode 0x82 is not read"),  # EXT1
    (b"\x80\x02\x83\x01\x00.", "opcode 0x83 is not read"),
    (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode 0x84 is not read"),
    (b"\x80\x05\x97.", "opcode 0x97 is not read"),  # NEXT_BUFFER
    (b"P1\n.", "opcode 0x50 is not read"),  # PERSID
    (b"\x80\x02K\x01Q.", "a persistent id"),
    (b"\x80\x02K\x01)R.", "a call of a int"),
    (b"\x80\x02cos\nsystem\nK\x01R.", "arguments that are no tuple"),
    (b"\x80\x02]K\x01b.", "a state for a list"),
    (b"\x80\x02K\x01K\x02a.", "items for a int"),
    (b"\x80\x02]K\x01K\x02s.", "keys for a list"),
    (b"\x80\x02}(K\x01u.", "a key without a value"),
    (b"\x80\x02}]K\x01s.", "a list as the key of a dict or set"),
    (b"\x80\x02})\x85K\x01s.", "a tuple as the key of a dict or set"),
    (b"\x80\x04](K\x01\x90.", "members for a list"),
    (b"\x80\x04\x8f(]\x90.", "a list as the key"),
    (b"\x80\x04K\x01K\x02\x93.", "a global without a name"),
    (b"\x80\x02h\x05.", "memo slot 5 is empty"),
    (b"\x80\x02.", "its stack is empty"),
    (b"\x80\x02q\x00.", "its stack is empty"),
    (b"\x80\x02t.", "a mark is missing"),
    (b"\x80\x02", "it ends early"),
    (b"", "it ends early"),
    (b"\x80\x02cos", "it ends early"),
    (b"\x80\x02X\xff\xff\xff\xffabc.", "it ends early"),
    (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "it ends early"),
    (b"\x80\x02X\x01\x00\x00\x00\xff.", "codec can't decode"),
])
def test_damage_is_a_value_error(data, message):
    with pytest.raises(ValueError, match=rf"damaged pickle \(byte \d+\): .*{message}"):
        loads(data)


def test_extension_codes_stay_unread():
    import copyreg

    copyreg.add_extension(HERE, "boom", 0xE0)
    try:
        data = pickle.dumps(boom, 2)
        assert b"\x82\xe0" in data
        with pytest.raises(ValueError, match="opcode 0x82"):
            loads(data)
    finally:
        copyreg.remove_extension(HERE, "boom", 0xE0)


def test_deep_and_self_multiplying_data_is_harmless():
    deep = b"\x80\x02)" + b"\x85" * 100_000
    assert isinstance(loads(deep + b"."), tuple)
    with pytest.raises(ValueError, match="a tuple as the key"):
        loads(b"\x80\x02}" + deep[2:] + b"K\x01s.")
    doubling = b"\x80\x02X\x01\x00\x00\x00a" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86"
                                                        for i in range(200)) + b"."
    assert len(loads(doubling)) == 2
    assert loads(b"\x80\x02r\xff\xff\xff\xff."[:2] + b"Nr\xff\xff\xff\xff.") is None
    lists = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    assert isinstance(loads(lists), list)


@pytest.mark.parametrize("protocol", [2, 4])
def test_fuzzed_pickles_raise_value_error_only(protocol):
    value = {"cfg": {"a": 1, "b": [1.5, None, "text"]}, "state": Reduced(boom, (1, (2, 3)), {"x": {1: 2}}),
             "od": collections.OrderedDict(a=(1, 2), b={"k": b"bytes"})}
    good = pickle.dumps(value, protocol)
    random_ = random.Random(protocol)
    outcomes = collections.Counter()
    for _ in range(6000):
        data = bytearray(good)
        for _ in range(random_.randrange(1, 4)):
            at = random_.randrange(len(data))
            kind = random_.randrange(4)
            if kind == 0:
                data[at] = random_.randrange(256)
            elif kind == 1:
                del data[at:at + random_.randrange(1, 9)]
            elif kind == 2:
                data[at:at] = data[random_.randrange(len(data)):][:random_.randrange(9)]
            else:
                data[at:at + 4] = struct.pack("<I", random_.choice([0, 0xFFFFFFFF, 0x7FFFFFFF, 65536]))
        try:
            loads(bytes(data), {"collections.OrderedDict": dictionary})
            outcomes["read"] += 1
        except ValueError:
            outcomes["ValueError"] += 1
    assert outcomes["ValueError"] > 1000 and outcomes["read"] > 100
