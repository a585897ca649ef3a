"""The state that a function can reach, taken down and put back: what `compare` and `verify` undo.

From the arguments, the closure and the globals that the code names (and those of the functions it calls) everything is
followed that holds Tensors: Modules, optimizers, lists, tuples, dicts, attributes of plain objects. What Python itself
does to other objects cannot be undone.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from jitgrad.amp.scaler import GradScaler
from jitgrad.compile.location import overwrite
from jitgrad.functional.random import Generator, default_generator
from jitgrad.nn.module import Module
from jitgrad.optim.optimizer import Optimizer
from jitgrad.tensor import Tensor


class State:
    """Contents of reachable Tensors, gradients, optimizer state, Module attributes and random streams, as of now."""

    def __init__(self, function: Any, args: Any):
        self.tensors: dict[int, Tensor] = {}
        self.modules: dict[int, Module] = {}
        self.optimizers: dict[int, Optimizer] = {}
        self.generators: dict[int, Generator] = {id(default_generator): default_generator}
        self._seen: dict[int, Any] = {}
        self._follow(function)
        self._follow(args)
        self.contents = {k: t._forced().copy() for k, t in self.tensors.items()}
        self.gradients = {k: (t._grad, None if t._grad is None else t._grad._forced().copy())
                          for k, t in self.tensors.items()}
        self.attributes = {k: [dict(m.__dict__), dict(m._buffers)] for k, m in self.modules.items()}
        self.entries = {k: {p: dict(entry) for p, entry in o.state.items()} for k, o in self.optimizers.items()}
        self.streams = {k: g.get_state() for k, g in self.generators.items()}

    def _follow(self, x: Any) -> None:
        stack = [x]
        while stack:
            x = stack.pop()
            if id(x) in self._seen or isinstance(x, (str, bytes, int, float, np.ndarray, type, types.ModuleType)):
                continue
            self._seen[id(x)] = x
            stack.extend(self._below(x))

    def _below(self, x: Any) -> list[Any]:
        if isinstance(x, Tensor):
            self.tensors[id(x)] = x
            return []
        if isinstance(x, Module):
            self.modules[id(x)] = x
            return list(x.__dict__.values())
        if isinstance(x, Optimizer):
            self.optimizers[id(x)] = x
            return [g["params"] for g in x.param_groups] + list(x.state.values())
        if isinstance(x, GradScaler):
            return [x._scale, x._growth_tracker]
        if isinstance(x, Generator):
            self.generators[id(x)] = x
            return []
        if isinstance(x, (list, tuple, set, frozenset)):
            return list(x)
        if isinstance(x, dict):
            return list(x.values())
        if isinstance(x, types.MethodType):
            return [x.__self__, x.__func__]
        if isinstance(x, types.FunctionType):
            cells = [c.cell_contents for c in x.__closure__ or () if _filled(c)]
            names = _names(x.__code__)
            return [*cells, *(x.__defaults__ or ()), *(x.__globals__[n] for n in names if n in x.__globals__)]
        return list(getattr(x, "__dict__", {}).values()) if not type(x).__module__.startswith("jitgrad.") \
            or hasattr(x, "function") else []

    def restore(self) -> None:
        """Put everything back, in place."""
        for k, t in self.tensors.items():
            if t._array.flags.writeable:
                overwrite(t._array, self.contents[k])
            old, values = self.gradients[k]
            if old is not None and values is not None:
                overwrite(old._array, values)
            t._set_grad(old)
        for k, m in self.modules.items():
            fields, buffers = self.attributes[k]
            m.__dict__.update(fields)
            m._buffers.update(buffers)
        for k, o in self.optimizers.items():
            self._restore_entries(o, self.entries[k])
        for k, g in self.generators.items():
            g.set_state(self.streams[k])

    def _restore_entries(self, optimizer: Optimizer, entries: dict[Any, dict[str, Any]]) -> None:
        """First-step state that was made meanwhile starts from zero again, which is what it was made as."""
        for p, entry in optimizer.state.items():
            before = entries.get(p, {})
            for name, value in list(entry.items()):
                if name in before:
                    entry[name] = before[name]
                elif isinstance(value, Tensor):
                    overwrite(value._array, np.zeros(value.shape, value.dtype.numpy))

    def observe(self) -> dict[str, np.ndarray]:
        """Copies of all contents and gradients now, in a stable order, for comparing two runs."""
        found = {}
        for n, t in enumerate(self.tensors.values()):
            found[f"tensor {n}"] = t._on_host().copy()
            if t._grad is not None:
                found[f"gradient {n}"] = t._grad._on_host().copy()
        return found


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> set[str]:
    """The global names in a code object and those nested in it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
