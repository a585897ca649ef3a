"""Attention in bfloat16, forward and both ways, causal and not, at 4,096 to 16,384 tokens: as many tokens in a batch and as
wide a model in every case, as its papers have it. Rates are TFLOP/s; a causal mask halves the operations, the backward pass
takes two and a half times those of the forward pass (Dao 2023).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jitgrad as jg
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import EAGER, OURS, Case, applied

TOKENS, WIDTH = 16_384, 2048                   # of a batch; of all heads


def plain(lib: Any, q: Any, k: Any, v: Any) -> Any:
    return lib.nn.functional.scaled_dot_product_attention(q, k, v)


def causal(lib: Any, q: Any, k: Any, v: Any) -> Any:
    return lib.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def operands(shape: tuple[int, ...], count: int, bench: Bench) -> list[Any]:
    """Queries, keys, values, and a gradient of the result."""
    return [bench.normal(*shape, dtype=jg.bfloat16) for _ in range(count)]


def cases(small: bool = False) -> list[Case]:
    """In the order of the table."""
    total, width = (64, 32) if small else (TOKENS, WIDTH)
    ways = {"jitgrad": OURS, "PyTorch": EAGER}
    found = []
    for size in (16,) if small else (128, 64):
        for tokens in (32,) if small else (4096, 8192, 16_384):
            for function in (causal, plain):
                shape = (total // tokens, width // size, tokens, size)
                work = 4 * total * tokens * width // (2 if function is causal else 1)
                name = f"{shape[0]}x{shape[1]} heads of {size}, {tokens} tokens{', causal' * (function is causal)}"
                rank = 0 if tokens == 4096 and function is causal else 1 if tokens != 8192 else 2
                found += [Case(name, partial(operands, shape, 3), applied(function), work, ways=ways, kind="bfloat16",
                               rank=rank),
                          Case(f"{name}, both ways", partial(operands, shape, 4), applied(function, range(3)),
                               work * 7 // 2, ways=ways, kind="bfloat16", rank=rank)]
    return found
