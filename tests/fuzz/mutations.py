"""Damaged files and strange values, as a function of a random generator."""

import os
import random

# What YAML and Python make of a word: dates, booleans, big and missing numbers, other types.
VALUES = (
    *("2024-01-31", "2024-13-45", "2024-01-31 12:00:00", "!!binary aGk=", "!!set {a, b}", "~", ""),
    *("1+2j", "1e999", "-1e999", ".nan", ".inf", "-0", "0", "-1", "-5", "7", "0x10", "1_000"),
    *("9" * 30, "9" * 5000, "[]", "[a, b]", "[[1], [2]]", "[1, null]", "{}", "{a: 1}", "{1: 2}"),
    *("yes", "true", "False", "'", '"x', "[", "{", "*a", "&a [*a]", "!!python/object:os.system x"),
    *("\u2028", "\ud7ff", "$x$", "a" * 500, "None", "b'x'", "{1, 2}", "(1, 2)", "1 if", "("),
)


class Attack:
    """Leaves a trace in the working folder where a pickle of it is opened."""

    TRACE = "executed"

    def __reduce__(self):
        return (os.system, (f"touch {self.TRACE}",))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few changes of bytes, lines or values."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_WAYS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"x"
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _insert(data: bytes, rng: random.Random) -> bytes:
    i = rng.randint(0, len(data))
    return data[:i] + rng.choice((b"\0", b"\xff\xfe", b"\t", b":", b"[", b"*a", b"&a ")) + data[i:]


def _swap_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines)


def _another_value(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    key, colon, _ = lines[i].partition(b": ")
    if colon:
        lines[i] = key + colon + rng.choice(VALUES).encode()
    return b"\n".join(lines)


_WAYS = (_flip, _cut, _insert, _swap_lines, _another_value, _another_value, _another_value)
