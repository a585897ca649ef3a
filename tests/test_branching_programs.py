"""Random programs with state that branch on values: every call of the compiled one, replayed, sealed or sealed in part,
leaves what the undecorated one leaves. `--programs N` (divided by ten) says on how many.

Here it is about calls, not kernels: plans are carried out op by op with NumPy.
"""

import linecache
import random

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn, plans
from jitgrad.functional.random import default_generator
from jitgrad.ir.replay import evaluate
from jitgrad.tree import flatten

CALLS = 14
HEAD = """import jitgrad as jg
def step(self, x):
"""


class Holder(nn.Module):
    """What a program reads and changes."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jg.tensor([0.3, -0.7, 1.1]))
        self.register_buffer("a", jg.tensor([0.5, -0.25, 0.1]))
        self.register_buffer("b", jg.zeros(3))
        self.register_buffer("n", jg.zeros((), dtype=jg.int64))

    def observe(self):
        gradient = self.w.grad
        return [t.detach().numpy().copy() for t in (self.w, self.a, self.b, self.n)] + \
            ([] if gradient is None else [gradient.numpy().copy()])


class Writer:
    """Writes the text of one program."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lines = []
        self.made = 0

    def new(self):
        self.made += 1
        return f"t{self.made}"

    def tensor(self, names):
        return self.random.choice([*names, "x", "self.a", "self.b", "self.a", "self.w"])

    def expression(self, names):
        a, b = self.tensor(names), self.tensor(names)
        return "({})".format(self.random.choice([
            f"({a} + {b}).tanh()", f"{a} * {b}", f"({a} - {b}).relu()", f"{a}.abs() * 0.5", f"{a}.detach()",
            f"{a}[0:2].sum() * {b}", f"jg.stack([{a}, {b}]).mean(0)", f"{a}.clone()", f"jg.rand(3) * {a}",
            f"jg.where({a} > {b}, {a}, {b} * 0.5)", f"{a}.flip(0)", f"({a} * {b}).sum().expand(3)",
            f"{a} * jg.tensor([1.0, 0.5, -1.0])", f"{a}.view(3, 1).squeeze(1)"]))

    def condition(self, names):
        a = self.tensor(names)
        return self.random.choice([f"{a}.sum() > {self.random.choice([-0.5, 0.0, 0.3])}", f"({a} > 0.4).any()",
                                   "self.n % 3 == 0", f"{a}[1] < {self.tensor(names)}[0]"])

    def line(self, depth, text):
        self.lines.append("    " * depth + text)

    def block(self, depth, names, values, length):
        """Some statements; the names that exist after them."""
        names = list(names)
        for _ in range(length):
            kind = self.random.choice(["make", "make", "make", "in place", "bind", "change", "if", "while", "for", "value",
                                       "count", "slice", "return"])
            if kind == "make":
                names.append(self.new())
                self.line(depth, f"{names[-1]} = {self.expression(names[:-1])}")
            elif kind == "in place" and names:
                self.line(depth, f"{self.random.choice(names)}.mul_(0.5)" if self.random.random() < 0.5 else
                          f"{self.random.choice(names)}.copy_({self.expression(names)}.detach())")
            elif kind == "bind":
                self.line(depth, f"self.{self.random.choice('ab')} = {self.expression(names)}.detach()")
            elif kind == "change":
                self.line(depth, f"self.{self.random.choice('ab')}.add_({self.expression(names)}).clamp_(-2, 2)")
            elif kind == "slice":
                self.line(depth, f"self.{self.random.choice('ab')}[1:].sub_({self.tensor(names)}[:2]).clamp_(-2, 2)")
            elif kind == "count":
                self.line(depth, "self.n.add_(1)")
            elif kind == "value" and names:
                values.append(f"v{self.new()}")
                self.line(depth, f"{values[-1]} = {self.random.choice(names)}.sum().item()")
            elif kind == "if" and depth < 4:
                self.line(depth, f"if {self.condition(names)}:")
                self.block(depth + 1, names, [], self.random.randint(1, 3))
                if self.random.random() < 0.6:
                    self.line(depth, "else:")
                    self.block(depth + 1, names, [], self.random.randint(1, 3))
            elif kind == "while" and depth < 3:
                name = self.new()
                self.line(depth, f"{name} = {self.expression(names)}.detach().clamp(-1, 1) * 4")
                self.line(depth, f"while {name}.abs().max() > 1:")
                self.line(depth + 1, f"{name} = {name} * 0.5")
                names.append(name)
            elif kind == "for" and depth < 3:
                self.line(depth, f"for _ in range(int({self.tensor(names)}.abs().sum() * 2) % 3):")
                self.block(depth + 1, names, [], 1)
            elif kind == "return" and depth > 1 and self.random.random() < 0.5:
                self.line(depth, f"return {self.expression(names)}.detach()")
                return names
        self.line(depth, "pass")
        return names

    def program(self):
        with_gradients = self.random.random() < 0.5
        depth = 1
        if not with_gradients:
            self.line(1, "with jg.no_grad():")
            depth = 2
        values = []
        names = self.block(depth, [], values, self.random.randint(4, 10))
        if with_gradients and names:
            self.line(1, "self.w.grad = None")
            self.line(1, f"loss = ({self.random.choice(names)} * self.w).sum()")
            self.line(1, "loss.backward()")
        results = [f"{self.random.choice(names)}.detach()" for _ in range(2) if names] + values
        self.line(depth if not with_gradients else 1, f"return [{', '.join([*results, 'self.a'])}]")
        return HEAD + "\n".join(self.lines) + "\n"


class NumpyPlan:
    """A plan that carries out its graph op by op."""

    def __init__(self, graph):
        self.graph = graph

    def run(self, arrays):
        results = [np.array(r) for r in evaluate(self.graph, arrays)]
        count = len(self.graph.outputs)
        for (k, _), value in zip(self.graph.writes, results[count:], strict=True):
            np.copyto(arrays[k], value)
        return results[:count]


def define(text, name):
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    space = {}
    exec(compile(text, name, "exec"), space)
    return space["step"]


def carry_out(function, holder, call, seed):
    """What one call gives and leaves behind; of an error its type."""
    default_generator.manual_seed(seed)
    try:
        returned = []
        structure = flatten(function(holder, call), returned)
    except Exception as error:
        structure, returned = type(error), []
    leaves = [leaf.detach().numpy().copy() if isinstance(leaf, jg.Tensor) else leaf for leaf in returned]
    return structure, leaves, holder.observe(), default_generator.offset


def test_branching_programs(request, monkeypatch):
    monkeypatch.setattr(plans, "compile_graph", lambda graph, memory_budget, tuned: NumpyPlan(graph))
    sealed = 0
    for seed in range(request.config.getoption("--programs") // 10):
        text = Writer(seed).program()
        plain, compiled = define(text, f"<program {seed}>"), jg.compile(define(text, f"<program {seed}>"))
        one, other = Holder(), Holder()
        for call in range(CALLS):
            x = np.random.default_rng(call % 5).standard_normal(3).astype(np.float32)
            wanted, found = carry_out(plain, one, jg.tensor(x), call), carry_out(compiled, other, jg.tensor(x), call)
            message = f"program {seed}, call {call}\n{text}"
            assert wanted[0] == found[0], message
            assert wanted[3] == found[3], message
            for a, b in zip(wanted[1] + wanted[2], found[1] + found[2], strict=True):
                assert type(a) is type(b), message
                np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=message)
        sealed += compiled.statistics.sealed_calls > 0
    assert sealed > 0.5 * (seed + 1), f"{sealed} of {seed + 1} programs were sealed"


@pytest.mark.parametrize("seed", range(3))
def test_programs_are_programs(seed):
    """They run without an error, and branch."""
    text = Writer(seed).program()
    structure, *_ = carry_out(define(text, f"<program {seed}>"), Holder(), jg.ones(3), 0)
    assert not isinstance(structure, type), structure
    assert "if " in text or "while " in text or "range(" in text
