"""Switches of what computes: PyTorch's ``torch.backends``, as far as there is something to switch.

    jitgrad.backends.cuda.matmul.allow_tf32 = True      # float32 products on GPUs may be rounded to TF32

That is `set_float32_matmul_precision` by another name: True means "high", False "highest", and it reads as True for
"medium" as well.
"""

from __future__ import annotations

from typing import Any

from jitgrad import precision
from jitgrad.errors import DTypeError, JitgradError, complain


class NoSwitchError(JitgradError, AttributeError):
    """A switch that does not exist."""


class _Switches:
    """A group of names; to give it another one is an error."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(getattr(type(self), name, None), property):
            raise complain(NoSwitchError, f"backends.{type(self).__name__.strip('_').lower()}", f"there is no {name}",
                           fix="What can be set is backends.cuda.matmul.allow_tf32")
        object.__setattr__(self, name, value)


class _Matmul(_Switches):
    @property
    def allow_tf32(self) -> bool:
        """Whether float32 products on GPUs may be computed in TF32."""
        return precision.allows_less()

    @allow_tf32.setter
    def allow_tf32(self, allowed: bool) -> None:
        if not isinstance(allowed, bool):
            raise complain(DTypeError, "backends.cuda.matmul.allow_tf32", f"True or False, not {allowed!r}")
        precision.set_float32_matmul_precision("high" if allowed else "highest")


class _Cuda(_Switches):
    matmul = _Matmul()


cuda = _Cuda()
