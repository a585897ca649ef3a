"""Layers and optimizers for the JAX side of the training steps, with PyTorch's layouts, defaults and formulas.

Layers are functions of the weights `p`, a dict by the names in PyTorch's state dict. An optimizer is a pair of
functions: parameters -> state, and (parameters, gradients, state) -> both updated. `training_step` joins all to one
jitted function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as numpy
from jax import lax
from jax.nn import relu, sigmoid

__all__ = ["adam", "adamw", "attention", "batch_norm", "convolution", "cross_entropy", "gelu", "layer_norm", "linear",
           "lstm", "max_pool", "numpy", "relu", "sgd", "sigmoid", "training_step"]

Optimizer = tuple[Callable[..., Any], Callable[..., Any]]


def linear(p: Any, name: str, x: Any) -> Any:
    """[…, inputs] to […, outputs]."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def convolution(p: Any, name: str, x: Any, stride: int = 1, padding: int = 0) -> Any:
    """NCHW with weights OIHW; a bias where there is one."""
    result = lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
    bias = p.get(f"{name}.bias")
    return result if bias is None else result + bias[:, None, None]


def max_pool(x: Any) -> Any:
    """2x2 windows of NCHW."""
    return lax.reduce_window(x, -numpy.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def gelu(x: Any) -> Any:
    """The exact form, by the error function."""
    return jax.nn.gelu(x, approximate=False)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Mean over the rows."""
    return -numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def layer_norm(p: Any, name: str, x: Any) -> Any:
    """Over the last axis."""
    centered = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt((centered * centered).mean(-1, keepdims=True) + 1e-5)
    return centered * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def batch_norm(p: Any, name: str, x: Any, changed: dict[str, Any]) -> Any:
    """NCHW in training; the running statistics go to `changed`."""
    mean, variance, count = x.mean((0, 2, 3)), x.var((0, 2, 3)), x.size // x.shape[1]
    changed[f"{name}.running_mean"] = 0.9 * p[f"{name}.running_mean"] + 0.1 * mean
    changed[f"{name}.running_var"] = 0.9 * p[f"{name}.running_var"] + 0.1 * variance * (count / (count - 1))
    scale = p[f"{name}.weight"] * lax.rsqrt(variance + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]


def attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """[batch, tokens, heads, width of one head] each."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def lstm(inputs: Any, recurrent: Any) -> Any:
    """The last hidden state; `inputs` [steps, batch, 4 * hidden] are already multiplied by their weights."""
    def advance(state: Any, gates: Any) -> Any:
        hidden, cell = state
        i, f, g, o = numpy.split(gates + hidden @ recurrent.T, 4, axis=1)
        cell = sigmoid(f) * cell + sigmoid(i) * numpy.tanh(g)
        return (sigmoid(o) * numpy.tanh(cell), cell), None
    zero = numpy.zeros((inputs.shape[1], recurrent.shape[1]), inputs.dtype)
    return lax.scan(advance, (zero, zero), inputs)[0][0]


def sgd(lr: float, momentum: float = 0.0) -> Optimizer:
    """Stochastic gradient descent as PyTorch has it."""
    def start(parameters: Any) -> Any:
        return jax.tree.map(numpy.zeros_like, parameters) if momentum else ()

    def update(parameters: Any, gradients: Any, state: Any) -> Any:
        if momentum:
            gradients = state = jax.tree.map(lambda s, g: momentum * s + g, state, gradients)
        return jax.tree.map(lambda p, g: p - lr * g, parameters, gradients), state
    return start, update


def adam(lr: float, decay: float = 0.0) -> Optimizer:
    """Adam; with `decay` AdamW, whose weight decay stands apart from the gradient."""
    b1, b2, eps = 0.9, 0.999, 1e-8

    def start(parameters: Any) -> Any:
        zeros = jax.tree.map(numpy.zeros_like, parameters)
        return zeros, jax.tree.map(numpy.copy, zeros), numpy.float32(0)

    def update(parameters: Any, gradients: Any, state: Any) -> Any:
        m, v, t = state
        t = t + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, gradients)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, gradients)
        size, root = lr / (1 - b1 ** t), numpy.sqrt(1 - b2 ** t)
        return jax.tree.map(lambda p, m, v: p * (1 - lr * decay) - size * m / (numpy.sqrt(v) / root + eps),
                            parameters, m, v), (m, v, t)
    return start, update


def adamw(lr: float) -> Optimizer:
    """AdamW with PyTorch's default weight decay."""
    return adam(lr, decay=0.01)


def training_step(loss: Callable[..., Any], optimizer: Optimizer, parameters: Any, buffers: Any,
                  batch: Any) -> Callable[[], Any]:
    """One call is one training step on `batch`, done when it returns; it returns the loss."""
    start, update = optimizer

    def with_buffers(parameters: Any, buffers: Any, *batch: Any) -> Any:
        result = loss({**parameters, **buffers}, *batch)
        value, changed = result if isinstance(result, tuple) else (result, {})
        return value, {**buffers, **changed}

    def step(parameters: Any, buffers: Any, state: Any, *batch: Any) -> Any:
        (value, buffers), gradients = jax.value_and_grad(with_buffers, has_aux=True)(parameters, buffers, *batch)
        parameters, state = update(parameters, gradients, state)
        return value, parameters, buffers, state

    jitted = jax.jit(step, donate_argnums=(0, 1, 2))
    held = [parameters, buffers, start(parameters)]

    def call() -> Any:
        value, *held[:] = jitted(*held, *batch)
        return jax.block_until_ready((value, held))[0]
    return call
