"""The steps of `repro.moe.cpu_rows` compiled by numba for float32: one pass over memory where torch takes up to six.

On numpy arrays whose rows lie one after another. No sum is reordered, and only a product and the sum that takes it may be
fused, so how wide the processor's vectors are changes no bit.
"""

# The decorators have no types, and the compiled functions take what their signatures say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_OPTIONS: Any = {"fastmath": {"contract"}, "error_model": "numpy", "nogil": True}
_ROWS, _VALUES, _NUMBERS = "float32[:, ::1]", "float32[::1]", "int64[::1]"


def _compiled(*arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for these arguments, in half a second each, or load from numba's cache what was compiled before."""

    def compiled(function):
        try:
            return njit(f"void({', '.join(arguments)})", cache=True, **_OPTIONS)(function)
        except RuntimeError:  # no folder that a cache may be written to
            return njit(f"void({', '.join(arguments)})", **_OPTIONS)(function)

    return compiled


_LOG2_E = np.float32(np.log2(np.e))
# ln 2 in two parts, the first of so few bits that its product with a small integer is exact
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(np.log(2) - 0.693359375)
_ROUND = np.float32(1.5 * 2**23)  # added and taken away again: rounds to an integer
_BOUND = np.float32(87)  # e^87 is a normal number, and so is its inverse
_ONE, _HALF = np.float32(1), np.float32(0.5)
_TAYLOR = tuple(np.float32(1 / factorial) for factorial in (6, 24, 120, 720, 5040))


@intrinsic
def _as_float32(typing_context, bits):
    """The number that has these 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always", **_OPTIONS)
def _sigmoid(z):
    """1 / (1 + e^-z) to some units in the last place: e^-z = 2^n · e^r with |r| at most ln 2 / 2, and Taylor's series of e^r."""
    x = min(max(-z, -_BOUND), _BOUND)
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _TAYLOR[4]
    series = series * r + _TAYLOR[3]
    series = series * r + _TAYLOR[2]
    series = series * r + _TAYLOR[1]
    series = series * r + _TAYLOR[0]
    series = series * r + _HALF
    series = series * r * r + r + _ONE
    return _ONE / (_ONE + series * _as_float32((np.int32(n) + np.int32(127)) << np.int32(23)))


@_compiled(_ROWS, _NUMBERS, _ROWS)
def gather(x_TD, rows_N, out_ND):
    """See `repro.moe.cpu_rows`, as for the others."""
    for n in range(len(rows_N)):
        row = rows_N[n]
        for d in range(x_TD.shape[1]):
            out_ND[n, d] = x_TD[row, d]


@_compiled(_ROWS, _NUMBERS, _ROWS)
def scatter_add(y_TD, rows_N, z_ND):
    for n in range(len(rows_N)):
        row = rows_N[n]
        for d in range(y_TD.shape[1]):
            y_TD[row, d] += z_ND[n, d]


@_compiled(_ROWS, _VALUES, _ROWS)
def forward(h_NF, s_N, a_NF):
    F = a_NF.shape[1]
    for n in range(len(s_N)):
        gate_F, up_F, a_F, s = h_NF[n, :F], h_NF[n, F:], a_NF[n], s_N[n]
        for f in range(F):
            gate = gate_F[f]
            a_F[f] = gate * _sigmoid(gate) * up_F[f] * s


@_compiled(_ROWS, _VALUES, _ROWS, _ROWS, _ROWS, _VALUES)
def backward(h_NF, s_N, da_NF, a_NF, dh_NF, ds_N):
    """A dot product is summed by halves: the upper half of the row is added to the lower one until one number is left."""
    F = a_NF.shape[1]
    for n in range(len(s_N)):
        gate_F, up_F, a_F, da_F, s = h_NF[n, :F], h_NF[n, F:], a_NF[n], da_NF[n], s_N[n]
        dgate_F, dup_F = dh_NF[n, :F], dh_NF[n, F:]
        for f in range(F):
            gate, up, da = gate_F[f], up_F[f], da_F[f]
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            a = silu * up
            a_F[f] = a * s
            da_F[f] = da * a
            dup_F[f] = da * s * silu
            dgate_F[f] = da * s * up * (sigmoid + silu * (_ONE - sigmoid))
        left = F if len(ds_N) else 0
        while left > 1:
            half = left // 2
            low_F, high_F = da_F[:half], da_F[left - half : left]
            for f in range(half):
                low_F[f] += high_F[f]
            left -= half
        if len(ds_N):
            ds_N[n] = da_F[0]
