"""How exactly products of float32 matrices must be computed, and convolutions, which are such products on a GPU: one
setting for the whole process, PyTorch's.

"highest", the default, means float32. "high" and "medium" allow GPUs to round the factors to TF32 (10 bits behind the
point instead of 23; sums stay in float32), which their tensor cores multiply. Whether plans for GPUs use that is read when
they are made; on a CPU float32 products are computed in float32 whatever is set. `jitgrad.backends` shows the same setting
as a switch.
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
    on GPUs and do not ask for it: on a CPU float32 products are computed in float32 whatever is set."""
    global _precision
    if precision not in PRECISIONS:
        raise complain(DTypeError, "set_float32_matmul_precision", f"{precision!r} is none of "
                       f"{', '.join(map(repr, PRECISIONS))}")
    _precision = precision


def allows_tf32() -> bool:
    """Whether float32 products may be computed in TF32."""
    return _precision != "highest"
