"""A quantiser written from the spec alone: one weight at a time, one float32 operation at a time.

The reverse of :mod:`tools.vectors.oracle`; it uses nothing of uqff.  Weights are finite.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from tools.vectors import wire
from tools.vectors.wire import GGML, Blob, Shape, tensor

F32 = np.float32
Numbers = Sequence[np.float32]
BlockEncoders = dict[str, Callable[[Numbers], bytes]]


@cache
def _libm() -> ctypes.CDLL:
    library = ctypes.CDLL("libm.so.6")
    for function in (library.logf, library.expf):
        function.restype = ctypes.c_float
        function.argtypes = [ctypes.c_float]
    return library


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------

I32 = (-(2**31), 2**31 - 1)
I8, U8 = (-128, 127), (0, 255)


def to_int(x: np.float32, bounds: tuple[int, int] = I32) -> int:
    """``int(x)``: cuts off the fraction, saturates; 0 for what is not a number."""
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return bounds[1] if x > 0 else bounds[0]
    return min(max(int(x), bounds[0]), bounds[1])


def rounded(x: np.float32, bounds: tuple[int, int] = I32) -> int:
    """``round(x)``: ties away from zero."""
    if math.isnan(x) or math.isinf(x):
        return to_int(x, bounds)
    whole = math.floor(abs(float(x)) + 0.5)
    return min(max(whole if x > 0 else -whole, bounds[0]), bounds[1])


def limited(value: int, low: int, high: int) -> int:
    """Within bounds."""
    return min(max(value, low), high)


def total(terms: Iterable[np.float32]) -> np.float32:
    """A sum in order."""
    result = F32(0)
    for term in terms:
        result = result + term
    return result


def f16(x: np.float32) -> bytes:
    """Nearest, ties to even."""
    return np.float16(x).tobytes()


def wide(raw: bytes) -> np.float32:
    """A float16 as float32."""
    return F32(np.frombuffer(raw, "<f2")[0])


def bf16(x: np.float32) -> np.float32:
    """Nearest bfloat16, ties to even, as float32; finite or infinite."""
    bits = int(F32(x).view(np.uint32))
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return F32(np.uint32(bits).view(F32))


E4M3 = [(m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10)) for e in range(16) for m in range(8)][:0x7F]
"""The numbers of codes 0 to 0x7E."""


def e4m3(x: np.float32) -> int:
    """Nearest e4m3, ties to even, saturating at 448, 0xFF for what is not a number."""
    magnitude, sign = abs(float(x)), 0x80 if math.copysign(1, x) < 0 else 0
    if math.isnan(x):
        return 0xFF
    if magnitude >= 448:
        return sign | 0x7E
    above = bisect.bisect(E4M3, magnitude)
    return sign | min((above - 1, above), key=lambda code: (abs(E4M3[code] - magnitude), code & 1))


def extreme(values: Numbers) -> np.float32:
    """The number of largest magnitude, with its sign; the first of equals; 0 if all are 0."""
    found = F32(0)
    for value in values:
        if abs(value) > abs(found):
            found = value
    return found


def inverse(d: np.float32) -> np.float32:
    """1/d, or 0."""
    return F32(1) / d if d != 0 else F32(0)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of 32
# ---------------------------------------------------------------------------------------------------------------------


def _nibbles(q: Sequence[int]) -> bytes:
    return bytes(q[j] & 15 | (q[j + 16] & 15) << 4 for j in range(16))


def _fifth(q: Sequence[int]) -> bytes:
    return sum((code >> 4 & 1) << j for j, code in enumerate(q)).to_bytes(4, "little")


def q4_0(x: Numbers) -> bytes:
    """d, qs."""
    d = extreme(x) / F32(-8)
    i = inverse(d)
    return f16(d) + _nibbles([min(15, to_int(v * i + F32(8.5), U8)) for v in x])


def _low_high(x: Numbers) -> tuple[np.float32, np.float32]:
    low = high = x[0]
    for v in x[1:]:
        low, high = (v if v <= low else low), (v if v >= high else high)
    return low, high


def q4_1(x: Numbers) -> bytes:
    """d, m, qs."""
    m, high = _low_high(x)
    d = (high - m) / F32(15)
    i = inverse(d)
    return f16(d) + f16(m) + _nibbles([min(15, to_int((v - m) * i + F32(0.5), U8)) for v in x])


def q5_0(x: Numbers) -> bytes:
    """d, qh, qs."""
    d = extreme(x) / F32(-16)
    i = inverse(d)
    q = [min(31, to_int(v * i + F32(16.5), I8)) for v in x]
    return f16(d) + _fifth(q) + _nibbles(q)


def q5_1(x: Numbers) -> bytes:
    """d, m, qh, qs."""
    m, high = _low_high(x)
    d = (high - m) / F32(31)
    i = inverse(d)
    q = [to_int((v - m) * i + F32(0.5), U8) for v in x]
    return f16(d) + f16(m) + _fifth(q) + _nibbles(q)


def _q8(x: Numbers) -> tuple[np.float32, list[int]]:
    d = abs(extreme(x)) / F32(127)
    i = inverse(d)
    return d, [rounded(v * i, I8) for v in x]


def q8_0(x: Numbers) -> bytes:
    """d, qs."""
    d, q = _q8(x)
    return f16(d) + struct.pack("<32b", *q)


def q8_1(x: Numbers) -> bytes:
    """d, s, qs."""
    d, q = _q8(x)
    return f16(d) + f16(wide(f16(F32(sum(q)))) * wide(f16(d))) + struct.pack("<32b", *q)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of 256
# ---------------------------------------------------------------------------------------------------------------------


def _cut(x: Numbers, size: int) -> list[Numbers]:
    return [x[at : at + size] for at in range(0, len(x), size)]


def _scale_and_minimum(x: Numbers, n: int) -> tuple[np.float32, np.float32]:
    low, high = min(x), max(x)
    if low == high:
        return F32(0), F32(0)
    low = min(low, F32(0))
    i = F32(n) / (high - low)
    before = [0] * len(x)
    for _ in range(5):
        codes = [limited(rounded(i * (v - low)), 0, n) for v in x]
        scale = total((v - low) * F32(q) for v, q in zip(x, codes, strict=True)) / F32(sum(q * q for q in codes))
        mean = total(v - scale * F32(q) for v, q in zip(x, codes, strict=True)) / F32(len(x))
        low = F32(0) if mean > 0 else mean
        i = F32(1) / scale
        if codes == before:
            break
        before = codes
    return scale, -low


def _of_largest(values: list[np.float32], steps: int) -> tuple[np.float32, list[int]]:
    """The largest (at least 0), and each as multiples of a ``steps``-th of it."""
    largest = F32(0)
    for value in values:
        largest = value if value >= largest else largest
    if not largest > 0:
        return F32(0) if steps == 15 else largest, [0] * len(values)
    unit = F32(steps) / largest
    return largest, [min(steps, rounded(unit * value)) for value in values]


def _with_minimum(x: Numbers, size: int, n: int, steps: int) -> tuple[bytes, bytes, list[int], list[int], list[int]]:
    found = [_scale_and_minimum(part, n) for part in _cut(x, size)]
    largest_scale, scales = _of_largest([scale for scale, _ in found], steps)
    largest_minimum, minima = _of_largest([minimum for _, minimum in found], steps)
    d, dmin = f16(largest_scale / F32(steps)), f16(largest_minimum / F32(steps))
    codes = []
    for part, s, m in zip(_cut(x, size), scales, minima, strict=True):
        step, offset = wide(d) * F32(s), wide(dmin) * F32(m)
        codes += [0 if step == 0 else limited(rounded((v + offset) / step), 0, n) for v in part]
    return d, dmin, scales, minima, codes


def _pack_2bit_codes(q: Sequence[int]) -> bytes:
    return bytes(
        sum((q[128 * h + line + 32 * k] & 3) << 2 * k for k in range(4)) for h in range(2) for line in range(32)
    )


def q2k(x: Numbers) -> bytes:
    """scales, qs, d, dmin."""
    d, dmin, scales, minima, q = _with_minimum(x, 16, 3, 15)
    return bytes(s | m << 4 for s, m in zip(scales, minima, strict=True)) + _pack_2bit_codes(q) + d + dmin


def _six_bits(s: list[int], m: list[int]) -> bytes:
    first = [s[j] | s[j + 4] >> 4 << 6 for j in range(4)]
    second = [m[j] | m[j + 4] >> 4 << 6 for j in range(4)]
    third = [s[j + 4] & 15 | (m[j + 4] & 15) << 4 for j in range(4)]
    return bytes(first + second + third)


def _pairs(q: Sequence[int]) -> bytes:
    places = itertools.product(range(4), range(32))
    return bytes(q[64 * c + line] & 15 | (q[64 * c + 32 + line] & 15) << 4 for c, line in places)


def q4k(x: Numbers) -> bytes:
    """d, dmin, scales, qs."""
    d, dmin, scales, minima, q = _with_minimum(x, 32, 15, 63)
    return d + dmin + _six_bits(scales, minima) + _pairs(q)


def _planes(bits: Sequence[int]) -> bytes:
    return bytes(sum(bits[32 * k + line] << k for k in range(8)) for line in range(32))


def q5k(x: Numbers) -> bytes:
    """d, dmin, scales, qh, qs."""
    d, dmin, scales, minima, q = _with_minimum(x, 32, 31, 63)
    return d + dmin + _six_bits(scales, minima) + _planes([code >> 4 for code in q]) + _pairs(q)


Term = Callable[[np.float32, int], np.float32]


def _search(x: Numbers, c: int, term: Term, rescale: bool) -> tuple[np.float32, list[int]]:
    """Scale and codes of a sub-block; scale 0 and codes -c for zeros."""
    largest = extreme(x)
    if largest == 0:
        return F32(0), [-c] * len(x)
    weights = [v * v for v in x]

    def sums(codes: list[int]) -> tuple[np.float32, np.float32]:
        a = total((w * v) * F32(q) for w, v, q in zip(weights, x, codes, strict=True))
        return a, total(term(w, q) for w, q in zip(weights, codes, strict=True))

    i = F32(-c) / largest
    codes = [limited(rounded(i * v), -c, c - 1) for v in x]
    a, b = sums(codes)
    for _ in range(3 if rescale else 0):
        scale = a / b
        other = [limited(rounded(F32(1) / scale * v), -c, c - 1) for v in x]
        a_, b_ = sums(other)
        if other == codes or b_ == 0 or a_ * a_ <= (scale * a) * b_:
            break
        codes, a, b = other, a_, b_
    for _ in range(5):
        changed = False
        for k, v in enumerate(x):
            rest_a, rest_b = a - (weights[k] * v) * F32(codes[k]), b - term(weights[k], codes[k])
            if not rest_a > 0:
                continue
            code = limited(rounded(v * rest_b / rest_a), -c, c - 1)
            a_, b_ = rest_a + (weights[k] * v) * F32(code), rest_b + term(weights[k], code)
            if code != codes[k] and b_ > 0 and (a_ * a_) * b > (a * a) * b_:
                codes[k], a, b, changed = code, a_, b_, True
        if not changed:
            break
    return a / b, codes


def q3k(x: Numbers) -> bytes:
    """hmask, qs, scales, d."""
    scales = [_search(part, 4, lambda w, q: w * (F32(q) * F32(q)), False)[0] for part in _cut(x, 16)]
    largest = extreme(scales)
    if largest == 0:
        six, d = [0] * 16, f16(F32(0))
    else:
        i = F32(-32) / largest
        six, d = [limited(rounded(i * s), -32, 31) + 32 for s in scales], f16(F32(1) / i)
    q = []
    for part, s in zip(_cut(x, 16), six, strict=True):
        step = wide(d) * F32(s - 32)
        q += [0 if step == 0 else limited(rounded(v / step), -4, 3) + 4 for v in part]
    packed = [six[j] & 15 | (six[j + 8] & 15) << 4 for j in range(8)]
    packed += [sum((six[j + 4 * k] >> 4) << 2 * k for k in range(4)) for j in range(4)]
    return _planes([code >> 2 for code in q]) + _pack_2bit_codes(q) + bytes(packed) + d


def q6k(x: Numbers) -> bytes:
    """ql, qh, scales, d."""
    found = [_search(part, 32, lambda w, q: (w * F32(q)) * F32(q), True) for part in _cut(x, 16)]
    i = F32(-128) / extreme([scale for scale, _ in found])
    scales, d = [min(127, rounded(i * scale)) for scale, _ in found], f16(F32(1) / i)
    q = []
    for part, s, (_, searched) in zip(_cut(x, 16), scales, found, strict=True):
        step = wide(d) * F32(s)
        for v, code in zip(part, searched, strict=True):
            q.append((code if step == 0 else limited(rounded(v / step), -32, 31)) + 32)
    ql = bytes(q[128 * h + j] & 15 | (q[128 * h + 64 + j] & 15) << 4 for h in range(2) for j in range(64))
    return ql + _pack_2bit_codes([code >> 4 for code in q]) + struct.pack("<16b", *scales) + d


def q8k(x: Numbers, code: int = -127) -> bytes:
    """d, qs, bsums; ``code`` of the extreme is -128 before mistral.rs 0.9."""
    largest = extreme(x)
    if largest == 0:
        return bytes(4 + 256 + 32)
    i = F32(code) / largest
    q = [127 if code == -128 and math.isnan(i * v) else limited(rounded(i * v), -128, 127) for v in x]
    return struct.pack("<f256b16h", F32(1) / i, *q, *(sum(part) for part in _cut(q, 16)))  # type: ignore[arg-type]


BLOCKS: BlockEncoders = {"q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1, "q8_0": q8_0, "q8_1": q8_1}
BLOCKS |= {"q2k": q2k, "q3k": q3k, "q4k": q4k, "q5k": q5k, "q6k": q6k, "q8k": q8k}

# ---------------------------------------------------------------------------------------------------------------------
# Other families
# ---------------------------------------------------------------------------------------------------------------------


def _afq(x: Numbers, shape: Shape, bits: int, dtype: str) -> Blob:
    top, stream, scales, biases = F32(2**bits - 1), 0, [], []
    for g, group in enumerate(_cut(x, 64)):
        low, high = _low_high(group)
        low = low + F32(0)
        span = high - low
        scale = F32(1) if abs(span) < F32(1e-12) else span / top
        for j, v in enumerate(group):
            stream |= limited(rounded((v - low) / scale), 0, int(top)) << bits * (64 * g + j)
        scales.append(float(scale))
        biases.append(float(low))
    rows, columns = shape
    w_q = tensor("U32", rows, columns * bits // 32, data=stream.to_bytes(len(x) * bits // 8, "little"))
    parts = (tensor(dtype, rows, columns // 64, data=stored(dtype, values)) for values in (scales, biases))
    return wire.afq((w_q, *parts), bits, 64)  # type: ignore[arg-type]


def stored(dtype: str, values: Iterable[float]) -> bytes:
    """Numbers in a load dtype, rounded to nearest even."""
    if dtype == "BF16":
        return b"".join(struct.pack("<f", bf16(F32(value)))[2:] for value in values)
    return np.array(list(values), F32).astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def _hqq(x: Numbers, shape: Shape, bits: int) -> Blob:
    """All elements at a time, each operation still one float32 operation of each; sums go row by row."""
    top, n = F32(2**bits - 1), len(x) // 64
    grid = np.array(x, F32).reshape(64, n)
    lows, highs = grid.min(0), grid.max(0)
    s = np.minimum(np.maximum(F32(1) / (highs - lows) * top, F32(0)), F32(20000))
    z = -lows * s

    def codes() -> npt.NDArray[np.float32]:
        y = grid * s + z
        whole = np.where(y > 0, np.floor(np.abs(y.astype(np.float64)) + 0.5), 0)
        return np.where(np.isnan(y), 0, np.minimum(whole, top)).astype(F32)

    beta, best, c = 10.0, F32(10000), F32(0.7) - F32(1)
    for _ in range(10):
        q = codes()
        e = grid - (q - z) / s
        a = np.abs(e)
        power = np.array([_libm().expf(c * F32(_libm().logf(each))) for each in a.reshape(-1)], F32).reshape(64, n)
        kept = a - F32(1 / beta) * power
        kept = np.where(kept > 0, kept, F32(0))
        z = total(q - (grid - np.where(e > 0, kept, -kept)) * s) * F32(1 / 64) + F32(0)
        beta *= 1.01
        error = _mean(a.reshape(-1))
        if not error < best:
            break
        best = error
    made = [int(code) for code in codes().reshape(-1)]
    half = 32 * n
    packed = bytes(made) if bits == 8 else bytes(made[at] << 4 | made[at + half] for at in range(half))
    parts = (
        tensor("U8", len(packed) // n, n, data=packed),
        tensor("F32", 1, n, data=stored("F32", (F32(1) / scale for scale in s))),
        tensor("F32", 1, n, data=stored("F32", z)),
    )
    return wire.hqq(parts, shape, bits, 64, 0)


def _mean(values: Numbers) -> np.float32:
    lanes = [F32(0)] * 32
    whole = len(values) // 32 * 32
    for k, value in enumerate(values[:whole]):
        lanes[k % 32] = lanes[k % 32] + value
    a, b, c, d = (lanes[at : at + 8] for at in range(0, 32, 8))
    eight = [(a[k] + b[k]) + (c[k] + d[k]) for k in range(8)]
    four = [eight[k] + eight[k + 4] for k in range(4)]
    result = (four[0] + four[1]) + (four[2] + four[3])
    for value in values[whole:]:
        result = result + value
    return result * (F32(1) / F32(len(values)))


def _fp8(x: Numbers, shape: Shape) -> Blob:
    loaded = [bf16(v) for v in x]
    s = bf16(bf16(F32(1) / max(abs(v) for v in loaded)) * F32(416))
    s = min(max(s, F32(-416)), F32(416))
    codes = bytes(e4m3(bf16(v * s)) for v in loaded)
    dequant = wire.f32(float(F32(1) / s))
    return wire.fp8(tensor("F8E4M3", *shape, data=codes), (dequant, dequant, wire.f32(float(s))))


def _f8q8(x: Numbers, shape: Shape) -> Blob:
    padded = [*x, *[F32(0)] * (-len(x) % 32)]
    blocks = b""
    for block in _cut(padded, 32):
        d, q = _q8(block)
        blocks += bytes([e4m3(d * F32(416))]) + struct.pack("<32b", *q)
    return wire.f8q8(shape, blocks)


def _mxfp4(x: Numbers, shape: Shape) -> Blob:
    scales, codes = [], []
    for block in _cut(x, 32):
        a = abs(extreme(block))
        logarithm = F32(np.log2(np.float64(a / F32(6)))) if a != 0 else F32(0)
        scale = limited(math.floor(logarithm) + 127, 0, 254)
        scales.append(scale)
        for v in (value * F32(2.0 ** (127 - scale)) for value in block):
            magnitude = sum(abs(v) >= threshold for threshold in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
            codes.append(int(magnitude) | (8 if v < 0 else 0))
    rows, columns = shape
    packed = bytes(codes[at] | codes[at + 1] << 4 for at in range(0, len(codes), 2))
    blocks = tensor("U8", rows, columns // 2, data=packed)
    return wire.mxfp4(blocks, tensor("U8", rows, columns // 32, data=bytes(scales)))


def encode(weights: Numbers, shape: Shape, kind: str, dtype: str, *, before_0_9: bool = False) -> bytes:
    """The blob of a matrix ``[out, in]``, of the version that introduced its family.

    Args:
        weights: row major, already rounded to the load dtype.
        shape: of the matrix.
        kind: a type that fits the shape.
        dtype: the load dtype, F32, F16 or BF16, in which AFQ stores scales and biases.
        before_0_9: as mistral.rs before 0.9 does it; it differs in Q8K.
    """
    with np.errstate(all="ignore"):
        if kind == "q8k" and before_0_9:
            return bytes(wire.gguf(kind, shape, b"".join(q8k(block, -128) for block in _cut(weights, 256))))
        if kind in BLOCKS:
            blocks = _cut(weights, GGML[kind][1])
            return bytes(wire.gguf(kind, shape, b"".join(map(BLOCKS[kind], blocks))))
        if kind.startswith("afq"):
            return bytes(_afq(weights, shape, int(kind[3:]), dtype))
        if kind.startswith("hqq"):
            return bytes(_hqq(weights, shape, int(kind[3:])))
        return bytes({"fp8": _fp8, "f8q8": _f8q8, "mxfp4": _mxfp4}[kind](weights, shape))
