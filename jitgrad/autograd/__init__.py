"""Reverse-mode differentiation of what a program does: the tape, and the walk back over it.

Every op on a Tensor that requires gradients leaves a node on the tape (`OpNode`); a custom `Function` and a compiled
call leave nodes of their own. `backward` and `grad` walk the nodes in reverse order of their making and call the
gradient rules of the op records. The rules are ops: run by the eager interpreter they compute, run while a function is
being compiled they are recorded, and with ``create_graph`` they leave nodes themselves, so that any order follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgrad.autograd.function import Function, FunctionNode
from jitgrad.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from jitgrad.autograd.modes import (
    detect_anomaly,
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    mode,
    no_grad,
    set_detect_anomaly,
    set_grad_enabled,
)
from jitgrad.autograd.saved import Frame, Held, keep, keeping
from jitgrad.autograd.tape import Edge, OpNode, SpentNode, TapeNode, add_hook, edge_of, next_sequence, record
from jitgrad.autograd.walk import backward, grad, leaves_of
from jitgrad.ir.interpreter import state

__all__ = ["Edge", "Frame", "Function", "FunctionNode", "GradcheckError", "Held", "OpNode", "SpentNode", "TapeNode",
           "add_hook", "backward", "detect_anomaly", "eager_state", "edge_of", "enable_grad", "grad", "gradcheck",
           "gradgradcheck", "inference_mode", "is_grad_enabled", "is_inference_mode_enabled", "keep", "keeping",
           "leaves_of", "mode", "next_sequence", "no_grad", "number", "record", "set_detect_anomaly", "set_grad_enabled"]


def number(mapping: Any, *keys: Any) -> Any:
    """``mapping[key]`` (for several keys ``mapping[key][key]…``) as a number: a Python one, or a traced one while a
    function is being compiled, so that a scheduler may change it without a recompile."""
    return state.current.number(mapping, *keys)  # type: ignore[union-attr]


def eager_state(make: Callable[[], Any]) -> Any:
    """``make()``, run eagerly even while a function is being compiled: the first-step state of optimizers."""
    return state.current.eagerly(make)  # type: ignore[union-attr]
