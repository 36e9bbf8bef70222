"""Rows of weights that show mistakes of quantisers: drawn at random, each by a rule and a seed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from tools.vectors.wire import Chance

COLUMNS: Final = 256
F32 = npt.NDArray[np.float32]


def _integers(chance: Chance, count: int = COLUMNS) -> npt.NDArray[np.int64]:
    return np.array(struct.unpack(f"<{count}H", chance.take(2 * count)), np.int64)


def _uniform(chance: Chance) -> F32:
    return np.array(chance.uniform(-0.1, 0.1, COLUMNS), np.float32)


def _fine(chance: Chance) -> F32:
    """All 24 bits of a number are used."""
    high, low = _integers(chance), _integers(chance)
    return ((high << 8 | low & 255) - 2**23).astype(np.float32) * np.float32(2.0**-26)


def _powers(chance: Chance, low: int, high: int) -> F32:
    return np.ldexp(np.float32(1), (low + _integers(chance) % (high - low + 1)).astype(np.int32))


def _halves(chance: Chance, largest: int) -> F32:
    """Multiples of 1/2; a run of 32 has both ends of a range of ``largest``, so that codes are exact ties."""
    numbers = (_integers(chance) % (2 * largest + 1)).astype(np.float32) / np.float32(2)
    numbers[::32], numbers[1::32] = 0, largest
    return numbers


def _centred(chance: Chance, largest: int) -> F32:
    """Multiples of 1/2 from ``-largest`` to ``largest``, which is in each run of 32, with either sign or both."""
    numbers = (_integers(chance) % (4 * largest + 1) - 2 * largest).astype(np.float32) / np.float32(2)
    signs = _integers(chance, 16) % 2 * 2 - 1
    numbers[::16] = signs * largest
    return numbers


def _beside_halves(make: Callable[[Chance, int], F32], largest: int, chance: Chance) -> F32:
    """Some of the numbers one unit in the last place smaller."""
    made = make(chance, largest)
    return np.where(_integers(chance) % 3 == 0, np.nextafter(made, np.float32(0)), made)


def _few(chance: Chance) -> F32:
    """Small integers: many equal magnitudes."""
    width = 1 + int(_integers(chance, 1)[0]) % 6
    return (_integers(chance) % (2 * width + 1) - width).astype(np.float32)


def _sparse(chance: Chance) -> F32:
    """A few numbers among zeros."""
    return np.where(_integers(chance) % 8 == 0, _fine(chance), np.float32(0))


def _of_runs(chance: Chance, low: int, high: int, run: int) -> F32:
    """Fine numbers, each run of which has its own power of two."""
    return _fine(chance) * np.repeat(_powers(chance, low, high)[: COLUMNS // run], run)


def _shifted(chance: Chance) -> F32:
    """Fine numbers around a number of their own in each run of 16."""
    return _fine(chance) + np.repeat(_fine(chance)[:16], 16) * np.float32(2)


def _skewed(chance: Chance) -> F32:
    """Fine numbers, squared or cubed."""
    numbers = _fine(chance) * np.float32(4)
    return numbers * np.abs(numbers) if int(_integers(chance, 1)[0]) % 2 else numbers * numbers * numbers


def _flat(chance: Chance) -> F32:
    """Runs of 32 of a range about 1e-12."""
    steps = np.array([0.1, 0.5, 1.0, 2.0, 10.0, 50.0, 200.0, 1000.0], np.float32) * np.float32(1e-12)
    ranges = np.repeat(steps[_integers(chance, 8) % 8], 32)
    return np.where(_integers(chance) % 2 == 0, np.float32(0), ranges)


def _subnormal(chance: Chance) -> F32:
    """Runs of 32 of subnormal numbers, or hardly larger."""
    units = _integers(chance) - 2**15
    bits = np.repeat(_integers(chance, 8) % 24, 32)
    return (units << bits >> 13).astype(np.float32) * np.float32(2.0**-149)


def _small(chance: Chance) -> F32:
    return _fine(chance) * np.repeat(_powers(chance, -128, -100)[:8], 32)


def _huge(chance: Chance) -> F32:
    """Runs of 32 with numbers near the ends of float32."""
    return _fine(chance) * np.float32(15.9) * np.repeat(_powers(chance, 122, 127)[:8], 32)


def _six_times(chance: Chance) -> F32:
    """Runs of 32 whose largest is some units in the last place below 6 times a power of two."""
    ulps, powers = _integers(chance, 8) % 48, _powers(chance, -126, 125)[:8]
    numbers = _fine(chance).reshape(8, 32) * powers[:, None]
    bits = (powers * np.float32(6)).view(np.int32) - ulps.astype(np.int32)
    numbers[:, 5] = bits.view(np.float32)
    return numbers.reshape(-1)


def _ties_of_e4m3(chance: Chance) -> F32:
    """Runs of 32 whose largest, 416/127 times, is halfway between two numbers of three bits behind the point."""
    odd = 17 + _integers(chance, 8) % 8 * 2
    largest = (odd * np.float64(127) / 13 / 512).astype(np.float32) * _powers(chance, -8, 0)[:8]
    numbers = _fine(chance).reshape(8, 32) * np.float32(2.0**-6)
    numbers[:, 3] = largest
    return numbers.reshape(-1)


def _stepped(chance: Chance, steps: int, low: int, high: int, run: int) -> F32:
    """Halves from ``low`` to ``high``, each run times a whole number up to ``steps``, the first times it."""
    halves = low + (_integers(chance) % (2 * (high - low) + 1)).astype(np.float32) / np.float32(2)
    scales = 1 + (_integers(chance, COLUMNS // run) % steps).astype(np.float32)
    halves[:run], scales[0] = np.floor(halves[:run]), steps
    halves[::run], halves[1::run] = low, high
    return halves * np.repeat(scales, run)


TO: Final = (3, 7, 15, 31, 63, 255)
WITHIN: Final = (4, 8, 16, 32, 127, 128)
RULES: Final[dict[str, Callable[[Chance], F32]]] = {
    "uniform": _uniform,
    "fine": _fine,
    "magnitudes": lambda chance: np.abs(_fine(chance)),
    "few": _few,
    "sparse": _sparse,
    "cubed magnitudes": lambda chance: np.abs(_fine(chance) * np.float32(8)) ** 3,
    "small integers": lambda chance: (_integers(chance) % 21 - 10).astype(np.float32),
    "integers": lambda chance: (_integers(chance) % 121 - 60).astype(np.float32),
    "shifted": _shifted,
    "skewed": _skewed,
    "flat": _flat,
    "subnormal": _subnormal,
    "small": _small,
    "huge": _huge,
    "six times a power": _six_times,
    "ties of e4m3": _ties_of_e4m3,
    "runs": lambda chance: _of_runs(chance, -12, 0, 16),
    "far runs": lambda chance: _of_runs(chance, -24, 0, 32),
    "small runs": lambda chance: _of_runs(chance, -40, -20, 16),
    "powers": lambda chance: _fine(chance) * _powers(chance, -12, 0),
    "steps of Q2K": lambda chance: _stepped(chance, 15, 0, 3, 16),
    "steps of Q4K": lambda chance: _stepped(chance, 63, 0, 15, 32),
    "steps of Q5K": lambda chance: _stepped(chance, 63, 0, 31, 32),
    "steps of Q3K": lambda chance: _stepped(chance, 32, -4, 3, 16),
    "ties of d": lambda chance: _stepped(chance, 2049 + 2 * int(_integers(chance, 1)[0] % 1024), -4, 3, 16),
    "steps of Q6K": lambda chance: _stepped(chance, 128, -32, 31, 16),
    **{f"halves to {n}": partial(_halves, largest=n) for n in TO},
    **{f"halves within {n}": partial(_centred, largest=n) for n in WITHIN},
    **{f"beside halves to {n}": partial(_beside_halves, _halves, n) for n in TO},
    **{f"beside halves within {n}": partial(_beside_halves, _centred, n) for n in WITHIN},
}
"""How the numbers of a row are drawn."""


def row(rule: str, seed: int) -> F32:
    """256 weights.

    Args:
        rule: one of :data:`RULES`.
        seed: of the draw.
    """
    with np.errstate(over="ignore", under="ignore"):
        return RULES[rule](Chance(f"{rule} {seed}")).astype(np.float32)


HEIGHT: Final = 64
"""Weights of a group of HQQ, which lie as far apart as there are groups."""


def edges_of_hqq() -> F32:
    """``[4, 256]``, 16 groups, one a column: constants, ties that leave the zero alone, zeros of -0.0, small ranges."""
    chance = Chance("edges of hqq")
    columns = [np.full(HEIGHT, each, np.float32) for each in (0.7, 0, -3)]
    columns += [_balanced(chance, largest) for largest in (15, 15, 15, 255, 255, 255)]
    for small in (1e-8, 5e-10):
        underflow = np.zeros(HEIGHT, np.float32)
        underflow[3], underflow[10:30] = 2.0**127, small
        columns.append(underflow)
    columns += [_fine(chance)[:HEIGHT] * np.float32(4 * size) for size in (1e-6, 7e-4, 2e-3, 1e-2, 3e-2)]
    return np.stack(columns, axis=1).reshape(4, COLUMNS)


def _balanced(chance: Chance, largest: int) -> F32:
    """From 0 to ``largest`` times 2^-10: as many fractions 1/2 as pairs of 1/4, so that the mean of q - w is 0."""
    whole = (_integers(chance) % (largest - 1)).astype(np.float32)[:HEIGHT]
    whole[0], whole[1] = 0, largest
    whole[2:12] += np.float32(0.5)
    whole[12:32] += np.float32(0.25)
    half = np.float32(0.5)
    whole[40:42] = np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(1))
    return whole * np.float32(2.0**-10)


def matrix(rule: str, seed: int, count: int, factor: float = 1.0) -> F32:
    """``[count, 256]``: rows of a rule, times a number."""
    return np.array([row(rule, 100 * seed + index) for index in range(count)]) * np.float32(factor)


def overflow_of_bf16() -> F32:
    """``[2, 256]``: one number rounds to infinity in bfloat16."""
    numbers = matrix("fine", 0, 2, 8.0)
    numbers[0, 7] = np.finfo(np.float32).max
    return numbers


EDGES: Final = (
    ("subnormal", 2),
    ("flat", 17),
    ("steps of Q6K", 26),
    ("beside halves within 127", 4),
    ("huge", 1),
    ("six times a power", 1),
    ("ties of e4m3", 15),
    ("steps of Q4K", 9),
    ("steps of Q5K", 30),
    ("subnormal", 18),
    ("beside halves to 3", 2),
    ("beside halves to 7", 8),
    ("uniform", 24),
    ("fine", 32),
    ("six times a power", 14),
    ("far runs", 19),
    ("steps of Q5K", 10),
    ("beside halves to 15", 0),
    ("beside halves to 63", 0),
    ("beside halves to 255", 21),
    ("beside halves to 255", 27),
    ("beside halves within 4", 16),
    ("steps of Q6K", 833),
    ("steps of Q3K", 592),
    ("steps of Q3K", 1218),
    ("steps of Q5K", 125),
    ("few", 941),
    ("fine", 1664),
    ("fine", 1819),
    ("fine", 12599),
    ("fine", 22239),
    ("ties of d", 18),
    ("ties of d", 35),
)
"""Rule and seed of rows, each of which shows mistakes that the others do not; found by trying many seeds."""

TENSORS: Final[dict[str, tuple[tuple[str, ...], Callable[[], F32]]]] = {
    "edges-hqq": (("hqq4", "hqq8"), edges_of_hqq),
    "ties-15": (("hqq4", "hqq8"), lambda: matrix("beside halves to 15", 1, 4)),
    "ties-255": (("hqq4", "hqq8"), lambda: matrix("beside halves to 255", 3, 4)),
    "halves": (("hqq4", "hqq8"), lambda: matrix("halves to 255", 8, 4)),
    "huge": (("hqq4", "hqq8"), lambda: matrix("huge", 8, 4)),
    "stop": (("hqq4",), lambda: matrix("fine", 101, 3, 20.0)),
    "stop-a": (("hqq8",), lambda: matrix("fine", 832, 3, 340.0)),
    "stop-b": (("hqq8",), lambda: matrix("fine", 114, 3, 340.0)),
    "log": (("hqq4",), lambda: matrix("magnitudes", 255, 3, 48.0)),
    "exp": (("hqq4",), lambda: matrix("magnitudes", 92, 3, 48.0)),
    "log-8": (("hqq8",), lambda: matrix("cubed magnitudes", 655, 3, 200.0)),
    "exp-8": (("hqq8",), lambda: matrix("cubed magnitudes", 224, 3, 200.0)),
    "large": (("fp8",), lambda: matrix("fine", 0, 2, 40.0)),
    "below-1": (("fp8",), lambda: matrix("fine", 0, 2, 4.0)),
    "overflow": (("fp8",), overflow_of_bf16),
}
"""Weights for types whose bytes hang on the whole tensor: name, to those types and the matrix."""


def edges() -> F32:
    """The rows of :data:`EDGES`."""
    return np.array([row(rule, seed) for rule, seed in EDGES])
