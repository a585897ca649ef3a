"""`Parameter`: a Tensor that a Module counts among what it learns; `UninitializedParameter`: one whose shape is not known
yet."""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad import dtypes
from jitgrad.dtypes import DType
from jitgrad.tensor import Tensor, tensor_on


class Parameter(Tensor):
    """A leaf Tensor that registers itself when it becomes an attribute of a Module.

    It shares memory with `data`, a Tensor or a NumPy array (nothing is copied); ``requires_grad`` is True unless said
    otherwise."""

    def __init__(self, data: Any = None, requires_grad: bool = True):
        if data is None:
            data = np.empty(0, dtypes.get_default_dtype().numpy)
        super().__init__(data.detach()._forced() if isinstance(data, Tensor) else data, requires_grad)

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()


class UninitializedParameter(Parameter):
    """A Parameter without elements, until `materialize` says its shape."""

    def __init__(self, requires_grad: bool = True, device: Any = None, dtype: DType | None = None):
        super().__init__(new_parameter((0,), dtype, device), requires_grad)

    def materialize(self, shape: tuple[int, ...], device: Any = None, dtype: DType | None = None) -> None:
        """Become an ordinary Parameter of `shape`, whose values are still to be set, where it is now unless said
        otherwise."""
        self.data = new_parameter(shape, dtype or self.dtype, self.device if device is None else device)
        self.__class__ = Parameter                            # type: ignore[assignment]

    def __repr__(self) -> str:
        return "<UninitializedParameter>"


def new_parameter(shape: tuple[int, ...], dtype: DType | None = None, device: Any = None) -> Parameter:
    """A Parameter whose values are still to be set, on `device` or the default one."""
    return Parameter(tensor_on(np.empty(shape, (dtype or dtypes.get_default_dtype()).numpy), device))
