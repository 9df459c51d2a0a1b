"""A short run of what `make fuzz` does for long: the same bytes every time."""

import random

import pytest

from tests.fuzz.parsers import TARGETS, attempt

_PIECES = (
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"[",
    b"]",
    b'"',
    b"1e400",
    b"-1",
    b"99999999999999999999",
    b"NaN",
    b"\\ud800",
    b"\r\n",
    b"a",
)


def mutated(seed: bytes, chance: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        data[at : at + chance.choice((0, 0, 1, 1, 2, 8, 100))] = chance.choice(_PIECES) * chance.choice((1, 1, 1, 50))
        if data and chance.random() < 0.5:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_are_taken_or_refused(name: str) -> None:
    chance = random.Random(name)  # noqa: S311
    for _ in range(1500):
        attempt(name, mutated(TARGETS[name][1], chance))
