"""Causal attention, forward and backward, on long sequences: time beside PyTorch's and JAX's, and memory.

    python -m benchmarks attention

Eight heads, 64 wide, float32. The libraries take turns; medians are printed. Memory is what jitgrad's plan needs at its
peak, as a multiple of the operands and results that the call has in any case.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import jitgrad
from benchmarks.kernels.case import taking_part
from benchmarks.measure import interleave
from benchmarks.report import Table, milliseconds, ratio
from jitgrad.nn import functional

HEADS, WIDTH = 8, 64
TOKENS = (512, 1024, 2048, 4096, 8192)

Arrays = Sequence[np.ndarray]


def jitgrad_call(arrays: Arrays) -> Any:
    """A compiled function of q, k, v and the gradient of its result, which gives the result and three gradients."""
    q, k, v, g = [jitgrad.tensor(a) for a in arrays]
    for x in (q, k, v):
        x.requires_grad_()

    @jitgrad.compile
    def call(q: Any, k: Any, v: Any, g: Any) -> Any:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.detach(), *jitgrad.autograd.grad(out, (q, k, v), g)

    def run() -> Any:
        return call(q, k, v, g)

    run.compiled = call  # type: ignore[attr-defined]
    return run


def torch_call(arrays: Arrays) -> Any:
    torch = importlib.import_module("torch")
    q, k, v, g = [torch.from_numpy(a) for a in arrays]
    for x in (q, k, v):
        x.requires_grad_()

    def run() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), g)

    return run


def jax_call(arrays: Arrays) -> Any:
    jax = importlib.import_module("jax")
    q, k, v, g = [jax.numpy.asarray(a.transpose(0, 2, 1, 3)) for a in arrays]      # it wants the heads behind the tokens

    @jax.jit
    def call(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, is_causal=True), q, k, v)
        return out, pull(g)

    return lambda: jax.block_until_ready(call(q, k, v, g))


MAKERS: dict[str, Callable[[Arrays], Any]] = {"jitgrad": jitgrad_call, "PyTorch": torch_call, "JAX": jax_call}


def measure(tokens: int, seconds: float, only: Sequence[str]) -> dict[str, float]:
    """Seconds by library; and "memory"."""
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((1, HEADS, tokens, WIDTH), dtype=np.float32) for _ in range(4)]
    made = {name: make(arrays) for name, make in taking_part(MAKERS, only).items() if name != "JAX" or tokens <= 4096}
    results = {name: statistics.median(taken) for name, taken in interleave(made, budget=seconds).items()}
    if "jitgrad" in made:
        results["memory"] = made["jitgrad"].compiled.plan.memory.peak / (8 * arrays[0].nbytes)
    return results


def run(seconds: float, only: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """By number of tokens; `seconds` per library and number. JAX, which holds all scores, is left out beyond 4,096."""
    return {str(tokens): measure(tokens, seconds, only) for tokens in TOKENS}


def table(results: dict[str, dict[str, float]]) -> Table:
    """One row per number of tokens."""
    names = [name for name in next(iter(results.values())) if name != "memory"]
    rows = [[tokens, *[milliseconds(r.get(name)) for name in names], ratio(r.get("PyTorch"), r.get("jitgrad")),
             f"{r['memory']:.2f}x" if "memory" in r else "–"] for tokens, r in results.items()]
    return Table(f"causal attention, forward and backward, {HEADS} heads of {WIDTH}, milliseconds",
                 ["tokens", *names, "PyTorch / jitgrad", "peak / operands and results"], rows)
