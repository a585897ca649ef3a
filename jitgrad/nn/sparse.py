"""`Embedding`: a table that is looked up by integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from jitgrad.autograd import no_grad
from jitgrad.dtypes import DType
from jitgrad.functional import nn as F
from jitgrad.nn import init
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter, new_parameter
from jitgrad.tensor import Tensor


class Embedding(Module):
    """Indices [...] -> rows [..., embedding_dim]. The row at `padding_idx` begins as zeros and gets no gradient. Rows that
    are looked up are brought to a `norm_type`-norm of at most `max_norm`, in the table; with `scale_grad_by_freq` the
    gradient of a row is divided by how often it was looked up. Gradients are dense, so `sparse` is refused."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None,
                 max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
                 sparse: bool = False, _weight: Tensor | None = None, _freeze: bool = False, device: Any = None,
                 dtype: DType | None = None):
        super().__init__()
        if sparse:
            raise ValueError("Embedding: sparse=True asks for sparse gradients, and they are dense here. Leave it out: the "
                             "gradient has the same values")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"Embedding: padding_idx={padding_idx} is not a row of a table of {num_embeddings}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type, self.scale_grad_by_freq = max_norm, norm_type, scale_grad_by_freq
        if _weight is None:
            self.weight = new_parameter((num_embeddings, embedding_dim), dtype, device)
            self.reset_parameters()
        else:
            self.weight = Parameter(_weight)
        self.weight.requires_grad_(not _freeze)

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None,
                        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
                        sparse: bool = False) -> Embedding:
        """A layer whose table is the given matrix, not learned unless `freeze` is False."""
        rows, columns = embeddings.shape
        return cls(rows, columns, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight=embeddings,
                   _freeze=freeze)

    def reset_parameters(self) -> None:
        init.normal_(self.weight)
        if self.padding_idx is not None:
            with no_grad():
                row = np.arange(self.num_embeddings)[:, None] == self.padding_idx
                self.weight.masked_fill_(Tensor(row), 0.0)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)

    def extra_repr(self) -> str:
        defaults = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False}
        given = {name: getattr(self, name) for name in defaults}
        shown = "".join(f", {name}={value}" for name, value in given.items() if value != defaults[name])
        return f"{self.num_embeddings}, {self.embedding_dim}{shown}"
