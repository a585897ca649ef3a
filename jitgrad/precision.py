"""How exactly products of float32 matrices must be computed, and convolutions, which are such products on a GPU: one
setting for the whole process, PyTorch's.

"highest", the default, means as exactly as float32 arithmetic does. "high" and "medium" allow less: GPUs may round the
factors to TF32 (10 bits behind the point instead of 23; sums stay in float32), which their tensor cores multiply; on a CPU
convolutions may be made in large pieces by Winograd's maps, F(4x4, 3x3), with two to four times the error. Products of
matrices are computed in float32 there whatever is set. It is read when plans are made. `jitgrad.backends` shows the same
setting as a switch.
"""

from __future__ import annotations

from jitgrad.errors import DTypeError, complain

PRECISIONS = ("highest", "high", "medium")

_precision = "highest"


def get_float32_matmul_precision() -> str:
    """What `set_float32_matmul_precision` was given last."""
    return _precision


def set_float32_matmul_precision(precision: str) -> None:
    """How exactly float32 products must be computed: "highest" (the default), "high" or "medium". The last two allow TF32
    on GPUs and larger pieces of convolutions on CPUs, and ask for neither."""
    global _precision
    if precision not in PRECISIONS:
        raise complain(DTypeError, "set_float32_matmul_precision", f"{precision!r} is none of "
                       f"{', '.join(map(repr, PRECISIONS))}")
    _precision = precision


def allows_less() -> bool:
    """Whether float32 products may be computed less exactly: in TF32, convolutions in large pieces."""
    return _precision != "highest"
