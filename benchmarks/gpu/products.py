"""Matrix products: bfloat16 with bias and GELU, as the first layer of a feed-forward network has them, and without; float32,
exact and as TF32.

Contenders: jitgrad as it is, with what measuring chooses, and with its own kernels alone (without NVIDIA's library); PyTorch
in several kernels, in one call of cuBLASLt with its epilogue, and compiled. Rates are TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jitgrad as jg
from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.case import COMPILED, EAGER, OURS, Case, Compiler, Way, applied

OWN = Way("jitgrad", True, settings={"cublas": False})
TUNED = Way("jitgrad", True, mode="max-autotune")


def product(lib: Any, x: Any, weight: Any) -> Any:
    """Of x and the transposed weight, as a linear layer has it."""
    return x @ weight.T


def biased_gelu(lib: Any, x: Any, weight: Any, bias: Any) -> Any:
    """The form of GELU that cuBLASLt has."""
    functional = lib.nn.functional
    return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def by_epilogue(torch: Any, compiler: Compiler, operands: Sequence[Any]) -> Call:
    """PyTorch's call of cuBLASLt with bias and GELU."""
    x, weight, bias = operands
    return lambda: torch._addmm_activation(bias, x, weight.T, use_gelu=True)


@dataclass(frozen=True, slots=True)
class Product:
    """m rows of x times n rows of a weight, both k long."""

    m: int
    n: int
    k: int
    kind: str = "bfloat16"
    fused: bool = False
    rank: int = 1

    def case(self) -> Case:
        ways = {"jitgrad": OURS, "jitgrad, tuned": TUNED, "jitgrad, own kernel": OWN, "PyTorch": EAGER,
                "torch.compile": COMPILED}
        if self.fused:
            ways["PyTorch, cuBLASLt's epilogue"] = Way("torch", make=by_epilogue)
        what = ", bias and GELU" if self.fused else ""
        return Case(f"{self.m}x{self.n}x{self.k} {self.kind}{what}", self.operands,
                    applied(biased_gelu if self.fused else product), 2 * self.m * self.n * self.k, ways=ways,
                    kind=self.kind, rank=self.rank)

    def operands(self, bench: Bench) -> list[Any]:
        """Both factors, and the bias."""
        dtype = jg.bfloat16 if self.kind == "bfloat16" else jg.float32
        shapes = [(self.m, self.k), (self.n, self.k), *[(self.n,)] * self.fused]
        return [bench.normal(*shape, dtype=dtype, scale=scale) for shape, scale in zip(shapes, (1.0, self.k ** -0.5, 1.0))]


def cases(small: bool = False) -> list[Case]:
    """In the order of the table."""
    if small:
        return [p.case() for p in (Product(24, 40, 16, fused=True, rank=0), Product(24, 40, 16),
                                   Product(16, 16, 16, "float32"), Product(16, 16, 16, "tf32"))]
    found = [Product(n, n, n, fused=True, rank=0 if n in (4096, 8192) else 1) for n in (1024, 2048, 4096, 8192)]
    found += [Product(8192, 3072, 768, fused=True, rank=0), Product(8192, 16_384, 4096, fused=True)]
    found += [Product(8192, 2304, 768), Product(8192, 768, 3072), Product(8192, 50_304, 768), Product(768, 3072, 8192),
              Product(4096, 4096, 4096)]
    found += [Product(n, n, n, kind, rank=rank) for kind in ("float32", "tf32") for n, rank in ((4096, 1), (2048, 2))]
    return [p.case() for p in found]
