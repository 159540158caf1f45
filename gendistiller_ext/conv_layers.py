"""fairseq's string form of `conv_feature_layers`, by a small grammar."""

from __future__ import annotations

import re

from ._core import GD_MAX_CONV_LAYERS


def parse_conv_feature_layers(text: str) -> tuple[tuple[int, int, int], ...]:
    """Reads fairseq's string form of `conv_feature_layers` without evaluating it.

    The grammar is `list ["*" int] {"+" list ["*" int]}`, a list being triples (dim, kernel, stride) in
    brackets: "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2". Raises ValueError that says where it fails.
    """
    tokens = [(m.group(), m.start()) for m in re.finditer(r"[0-9]+|[^\s]", text, re.ASCII)]
    tokens.append(("end", len(text)))
    at = 0

    def fail(expected: str) -> ValueError:
        token, start = tokens[at]
        return ValueError(
            f"conv_feature_layers: expected {expected} at character {start} of {text[:200]!r}, "
            f"got {token[:20]!r}"
        )

    def take(symbol: str) -> None:
        nonlocal at
        if tokens[at][0] != symbol:
            raise fail(repr(symbol))
        at += 1

    def number() -> int:
        nonlocal at
        token = tokens[at][0]
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise fail("a number")
        at += 1
        return int(token)

    def triple() -> tuple[int, int, int]:
        take("(")
        dim = number()
        take(",")
        kernel = number()
        take(",")
        stride = number()
        take(")")
        return dim, kernel, stride

    def term() -> tuple[tuple[int, int, int], ...]:
        nonlocal at
        take("[")
        items = [triple()]
        while tokens[at][0] == ",":
            at += 1
            if tokens[at][0] == "]":
                break
            items.append(triple())
        take("]")
        if tokens[at][0] != "*":
            return tuple(items)
        at += 1
        times = number()
        # A bound before the product: the string comes from a file.
        return tuple(items) * min(times, GD_MAX_CONV_LAYERS + 1)

    layers = term()
    while tokens[at][0] == "+":
        at += 1
        layers += term()
        if len(layers) > GD_MAX_CONV_LAYERS:
            break
    if len(layers) <= GD_MAX_CONV_LAYERS and tokens[at][0] != "end":
        raise fail("'+', '*' or the end")
    return layers
