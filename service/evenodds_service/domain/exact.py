"""Arithmetic that gives the same bits on every processor, with every BLAS kernel, on any number of threads.

Two rules make it so. A *matrix product* is taken of whole numbers: both factors are rounded to multiples of a power of
two, so coarse that no partial sum needs more than the 53 bits of a float64. Then nothing is rounded while adding, and
the order of the terms, which a BLAS chooses by kernel, threads and the shape of the matrix, cannot show. (Error-free
products are an idea of Ozaki, Ogita, Oishi and Rump, Numerical Algorithms 59, 2012.) *Everything else* is made of
+, -, *, / and square roots of arrays, element by element, which IEEE 754 rounds alike everywhere: no LAPACK, and no
exponentials or logarithms of a mathematical library, whose last bits follow the processor's instructions.

Sums along an axis by numpy keep an order that depends on the array's shape alone: fine where all who compare sum the
same arrays, and along the last axis of rows; `in_order` where few prompts and many are to be told the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evenodds_service.domain.arrays import FloatArray, IntArray

MANTISSA = 53
_ROWS = 1_024
_LEAST_EXPONENT = -900
_SWEEPS = 24
_FEW = 4  # numbers that take less time one by one than as an array, whose every operation costs a microsecond

_PER_LN2 = 1.4426950408889634
_ROOT_OF_HALF = math.sqrt(0.5)
_LN2_HIGH, _LN2_LOW = (
    0.693359375,
    -2.121944400546905827679e-4,
)  # the first with 9 bits: times a whole number it is exact
# By type: the coefficients of the series, last first, as arrays of that type without axes, which add up the fastest.
_EXP_SERIES: dict[np.dtype[Any], tuple[FloatArray, ...]] = {
    np.dtype(kind): tuple(np.array(1.0 / math.factorial(n), kind) for n in range(terms, -1, -1))
    for kind, terms in ((np.float32, 7), (np.float64, 13))
}
_LOG_SERIES: dict[np.dtype[Any], tuple[FloatArray, ...]] = {
    np.dtype(kind): tuple(np.array(1.0 / (2 * n + 1), kind) for n in range(terms - 1, -1, -1))
    for kind, terms in ((np.float32, 5), (np.float64, 11))
}
# The same as numbers: Python's own for doubles.
_EXP_NUMBERS, _LOG_NUMBERS = (
    {kind: [number.item() if kind == np.float64 else number[()] for number in terms] for kind, terms in series.items()}
    for series in (_EXP_SERIES, _LOG_SERIES)
)
# By type: signed integers of its width, bits of the fraction, exponent of one, a number whose last bit is worth one.
_LAYOUT = {
    np.dtype(np.float32): (np.int32, 23, 127, 1.5 * 2.0**23, 87.0),
    np.dtype(np.float64): (np.int64, 52, 1023, 1.5 * 2.0**52, 708.0),
}


def whole_numbers(values: FloatArray, bits: int, *, axis: int | None) -> tuple[FloatArray, FloatArray]:
    """The values in units of a power of two, rounded to whole numbers of at most 2^bits, and that unit.

    Args:
        values: Finite.
        axis: Along which values share a unit; None for all of them.

    Returns:
        Whole numbers as float64, and units that broadcast to them.
    """
    values = np.asarray(values, dtype=np.float64)
    largest = np.abs(values).max(axis=axis, keepdims=True, initial=0.0)
    _, exponents = np.frexp(largest)
    exponents = np.maximum(exponents, _LEAST_EXPONENT)
    return np.rint(values * np.ldexp(1.0, bits - exponents)), np.ldexp(1.0, exponents - bits)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A matrix y [k, m] taken apart, once for all x that it is multiplied with: y ~ (high + low / 2^bits) unit."""

    high_k_m: FloatArray
    low_k_m: FloatArray
    unit_m: FloatArray

    @staticmethod
    def of(y_k_m: FloatArray) -> Factor:
        """The parts of a finite matrix."""
        bits = _bits_of(len(y_k_m))
        high, unit = whole_numbers(y_k_m, bits, axis=0)
        return Factor(high, np.rint((y_k_m / unit - high) * 2.0**bits), unit)


def product(x_n_k: FloatArray, y_k_m: FloatArray | Factor) -> FloatArray:
    """x y, float64 [n, m], to about 2^-40 of the largest terms. A row of it depends on the same row of x alone."""
    y = y_k_m if isinstance(y_k_m, Factor) else Factor.of(y_k_m)
    bits = _bits_of(x_n_k.shape[1])
    result = np.empty((len(x_n_k), y.high_k_m.shape[1]))
    for first in range(0, len(x_n_k), _ROWS):
        rows = x_n_k[first : first + _ROWS]
        x_high, x_unit = whole_numbers(rows, bits, axis=1)
        x_low = np.rint((rows / x_unit - x_high) * 2.0**bits)
        # Three sums without rounding; the fourth, of both rests, is too small to show.
        rest = x_high @ y.low_k_m + x_low @ y.high_k_m
        result[first : first + _ROWS] = (x_high @ y.high_k_m + rest * 2.0**-bits) * x_unit * y.unit_m
    return result


def gram(x_n_k: FloatArray, *, is_rough: bool = False) -> FloatArray:
    """x' x, float64 [k, k], to about 2^-36 (rough: 2^-18) of the largest products; symmetric to the last bit."""
    bits = _bits_of(len(x_n_k))
    high, unit = whole_numbers(x_n_k, bits, axis=0)
    whole = high.T @ high
    if not is_rough:
        rest = high.T @ np.rint((x_n_k / unit - high) * 2.0**bits)
        whole += (rest + rest.T) * 2.0**-bits
    return np.asarray(whole * (unit * unit.T))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A matrix y [k, m] that many x are multiplied with, where single precision is enough: one product, not three.

    Attributes:
        whole_k_m: y in whole numbers of each column's unit.
        unit_m: These units, powers of two.
    """

    whole_k_m: FloatArray
    unit_m: FloatArray

    @staticmethod
    def of(y_k_m: FloatArray, *, x_bits: int) -> Columns:
        """The columns of a finite matrix, for whole numbers x of at most 2^x_bits; y gets the bits that are left."""
        whole, unit = whole_numbers(y_k_m, MANTISSA - x_bits - _sum_bits(len(y_k_m)), axis=0)
        return Columns(whole, unit[0])

    def times(self, x_n_k: FloatArray) -> FloatArray:
        """x y in units of `unit_m`, float64 [n, m], for whole numbers x: without any rounding."""
        return np.asarray(x_n_k @ self.whole_k_m)


def _sum_bits(n_terms: int) -> int:
    return max(n_terms - 1, 0).bit_length()


def _bits_of(n_terms: int) -> int:
    """Bits of either factor for so many products to add up without rounding."""
    return (MANTISSA - _sum_bits(n_terms)) // 2


def in_order(terms: FloatArray) -> FloatArray:
    """Sum along the first axis, one term after the other whatever the shape (a plain sum pairs them where it can)."""
    return np.asarray(np.add.accumulate(terms, axis=0)[-1])


def weighted(x_n_d: FloatArray, w_d: FloatArray) -> FloatArray:
    """x w, float64 [n], each row by itself."""
    return np.asarray((np.asarray(x_n_d, dtype=np.float64) * w_d).sum(axis=1))


def solve(a_d_d: FloatArray, b_d_e: FloatArray) -> FloatArray:
    """The solution z of a z = b, [d, e] or [d], for a positive definite a: by elimination in the order of the rows.

    Raises:
        ValueError: a is not positive definite.
    """
    d = len(a_d_d)
    work = np.concatenate((a_d_d, b_d_e.reshape(d, -1)), axis=1, dtype=np.float64)
    for j in range(d):
        pivot = work[j, j]
        if not pivot > 0.0:
            raise ValueError(f"the matrix is not positive definite: pivot {j} of {d} is {pivot}")
        factors = work[:, j] / pivot
        factors[j] = 0.0
        work[:, j + 1 :] -= factors[:, None] * work[j, j + 1 :]
    return np.asarray((work[:, d:] / work.diagonal()[:, None]).reshape(b_d_e.shape))


def inverse_factor(a_d_d: FloatArray, *, tolerance: float = 0.0) -> FloatArray:
    """Lower triangular F [d, d] with F' F = a^-1 (the inverse of a's Cholesky factor), for a positive definite a.

    Args:
        tolerance: A row that the rows before it explain up to this share of its square is left out, as a row of zeros.

    Raises:
        ValueError: a is not positive definite, and there is no tolerance.
    """
    d = len(a_d_d)
    work = np.concatenate((a_d_d, np.eye(d)), axis=1, dtype=np.float64)
    for j in range(d):
        pivot = work[j, j]
        if pivot > tolerance * a_d_d[j, j]:
            work[j + 1 :, j + 1 : d + j + 1] -= (work[j + 1 :, j] / pivot)[:, None] * work[j, j + 1 : d + j + 1]
            work[j, d:] /= np.sqrt(pivot)
        elif tolerance > 0.0:
            work[j, d:] = 0.0
        else:
            raise ValueError(f"the matrix is not positive definite: pivot {j} of {d} is {pivot}")
    return np.asarray(work[:, d:])


def eigen(a_d_d: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues [d], greatest first, and eigenvectors as columns [d, d] of a symmetric matrix, by Jacobi's rotations.

    In each round d / 2 rotations that do not touch each other are made at once. For small matrices.
    """
    n = len(a_d_d)
    d = n + n % 2
    a, vectors = np.zeros((d, d)), np.eye(d)
    a[:n, :n] = a_d_d
    around = np.arange(1, d)
    for _ in range(_SWEEPS):
        off_diagonal = a - np.diag(a.diagonal())
        if np.abs(off_diagonal).max(initial=0.0) <= 1e-14 * np.abs(a.diagonal()).max(initial=0.0):
            break
        for _ in range(d - 1):
            seats = np.concatenate(([0], around))
            one, other = seats[: d // 2], seats[::-1][: d // 2]
            _rotate(a, vectors, np.minimum(one, other), np.maximum(one, other))
            around = np.roll(around, 1)
    order = np.argsort(-a.diagonal()[:n], kind="stable")
    return a.diagonal()[order], vectors[:n, order]


def _rotate(a: FloatArray, vectors: FloatArray, p: IntArray, q: IntArray) -> None:
    """Turn the planes (p, q) so that a[p, q] becomes 0, in place."""
    off = a[p, q]
    active = off != 0.0
    theta = (a[q, q] - a[p, p]) / np.where(active, 2.0 * off, 1.0)
    tangent = np.where(theta < 0.0, -1.0, 1.0) / (np.abs(theta) + np.sqrt(theta * theta + 1.0))
    tangent = np.where(active, tangent, 0.0)
    cosine = 1.0 / np.sqrt(tangent * tangent + 1.0)
    sine = tangent * cosine
    a[p], a[q] = cosine[:, None] * a[p] - sine[:, None] * a[q], sine[:, None] * a[p] + cosine[:, None] * a[q]
    for matrix in (a, vectors):
        left, right = matrix[:, p], matrix[:, q]
        matrix[:, p], matrix[:, q] = cosine * left - sine * right, sine * left + cosine * right


def exp(x: FloatArray | float) -> FloatArray:
    """e^x in single or double precision, whichever x has, within 2 units in the last place; 0 below -708 (-87)."""
    x = _in_precision(x)
    if x.size <= _FEW:
        return _one_by_one(_exp_of_one, x)
    integers, fraction, one, magic, most = _LAYOUT[x.dtype]
    limited = np.minimum(np.maximum(x, -most), most)
    shifted = limited * _PER_LN2 + magic
    times = shifted - magic
    rest = limited - times * _LN2_HIGH
    rest -= times * _LN2_LOW
    first, second, *others = _EXP_SERIES[x.dtype]
    result = rest * first + second
    for coefficient in others:
        result *= rest
        result += coefficient
    result *= ((shifted.view(integers) + one) << fraction).view(x.dtype)
    return np.asarray(np.where(x < -most, x.dtype.type(0.0), result))


def log(x: FloatArray | float) -> FloatArray:
    """The natural logarithm in single or double precision, whichever x has, within 2 units in the last place.

    Args:
        x: Positive (at least the smallest normal number) and finite, or NaN, which stays NaN.
    """
    x = _in_precision(x)
    if x.size <= _FEW:
        return _one_by_one(_log_of_one, x)
    integers, fraction, _, _, _ = _LAYOUT[x.dtype]
    bits = x.view(integers)
    # x = m 2^e with m between the roots of 1/2 and of 2
    exponent = (bits - x.dtype.type(_ROOT_OF_HALF).view(integers)) >> fraction
    mantissa = (bits - (exponent << fraction)).view(x.dtype)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    first, second, *others = _LOG_SERIES[x.dtype]
    series = square * first + second
    for coefficient in others:
        series *= square
        series += coefficient
    times = exponent.astype(x.dtype)
    result = 2.0 * ratio * series + times * _LN2_LOW
    result += times * _LN2_HIGH
    return np.asarray(np.where(np.isnan(x), x, result))


def _one_by_one(function: Callable[[Any, np.dtype[Any]], Any], x: FloatArray) -> FloatArray:
    """The function of each number. Doubles go as Python's own, which are as exact and the fastest."""
    numbers = x.ravel().tolist() if x.dtype == np.float64 else x.ravel()
    return np.array([function(number, x.dtype) for number in numbers], x.dtype).reshape(x.shape)


def _exp_of_one(x: Any, precision: np.dtype[Any]) -> Any:
    """As `exp`, operation by operation."""
    _, _, _, magic, most = _LAYOUT[precision]
    if x != x:
        return x
    if x < -most:
        return 0.0
    limited = x if x < most else precision.type(most)
    times = (limited * _PER_LN2 + magic) - magic
    rest = limited - times * _LN2_HIGH
    rest -= times * _LN2_LOW
    first, *others = _EXP_NUMBERS[precision]
    result = first
    for coefficient in others:
        result = result * rest + coefficient
    return math.ldexp(result, int(times))


def _log_of_one(x: Any, precision: np.dtype[Any]) -> Any:
    """As `log`, operation by operation."""
    if x != x:
        return x
    parts: tuple[Any, Any] = math.frexp(x)
    mantissa, exponent = parts
    if mantissa < precision.type(_ROOT_OF_HALF):
        mantissa, exponent = 2.0 * mantissa, exponent - 1
    if precision == np.float32:
        mantissa, exponent = np.float32(mantissa), np.float32(exponent)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    first, *others = _LOG_NUMBERS[precision]
    series = first
    for coefficient in others:
        series = series * square + coefficient
    result = 2.0 * ratio * series + exponent * _LN2_LOW
    return result + exponent * _LN2_HIGH


def _in_precision(x: FloatArray | float) -> FloatArray:
    """As an array of single precision where it is one, else of double."""
    x = np.asarray(x)
    return x if x.dtype == np.float32 else x.astype(np.float64, copy=False)


def log_sum(values: FloatArray) -> float:
    """log of the sum of e^values, of which one at least is finite; -inf counts as nothing."""
    top = float(values.max())
    return top + float(log(exp(values - top).sum()))


def sigmoid(z: FloatArray) -> FloatArray:
    """1 / (1 + e^-z), in the precision of z; z is limited to +-30."""
    return np.asarray(1.0 / (1.0 + exp(-np.minimum(np.maximum(z, -30.0), 30.0))))


def log_odds(rates: FloatArray) -> FloatArray:
    """log(p / (1 - p)) for rates in (0, 1), NaN where they are NaN."""
    one = rates.dtype.type(1.0)
    return log(rates / (one - rates))
