"""The hypothesis strategy of random programs (`tests.programs`).

A statement kind is a function of the `Writer`: it chooses among the values that exist so far and returns Python text, or
None when nothing suits. `FAMILIES` says which kinds, with which weights, a family of programs is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
from programs import Input, Program

import jitgrad as jg
from jitgrad.errors import JitgradError

FLOATS = (jg.float32, jg.float64, jg.bfloat16, jg.float16)
MAX_ELEMENTS = 96

Kind = Callable[["Writer"], "str | None"]


class Writer:
    """A program while it is drawn: its values are there, computed eagerly."""

    def __init__(self, draw: Callable[[Any], Any], dtypes: Sequence[Any], gradients: bool):
        self.draw = draw
        self.dtypes = dtypes
        self.sizes = [self.integer(1, 5) for _ in range(2)] + [1]
        if self.one_in(24):
            self.sizes[0] = 0
        self.program = Program(self._inputs(gradients))
        values = self.program.arguments()
        self.namespace: dict[str, Any] = {"jg": jg, "F": jg.nn.functional, **dict(zip(self.program.names, values))}
        self.names = list(self.program.names)
        self.went_back = False

    # --- choices

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one_in(self, n: int) -> bool:
        return self.integer(0, n - 1) == n - 1

    def choose(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def number(self) -> str:
        """A Python number, as text: one of the arguments, or a literal."""
        numbers = [n for n in self.names if isinstance(self.namespace[n], (int, float))]
        if numbers and self.one_in(3):
            return self.choose(numbers)
        return self.choose(["2", "0.5", "-1.5", "3", "0.1", "1", "0", "-2"])

    def pick(self, suits: Callable[[jg.Tensor], bool] = lambda t: True) -> str | None:
        """The name of a tensor that suits; the last ones are the likeliest."""
        found = [n for n in reversed(self.names) if isinstance(self.namespace[n], jg.Tensor) and suits(self.namespace[n])]
        return found[min(self.integer(0, len(found) - 1), self.integer(0, len(found) - 1))] if found else None

    def floating(self, suits: Callable[[jg.Tensor], bool] = lambda t: True) -> str | None:
        return self.pick(lambda t: t.dtype.is_floating_point and suits(t))

    def __getitem__(self, name: str) -> jg.Tensor:
        return self.namespace[name]

    def axis(self, name: str) -> int:
        ndim = self[name].ndim
        return self.integer(-ndim, ndim - 1)

    def partner(self, name: str, suits: Callable[[jg.Tensor], bool] = lambda t: True) -> str:
        """Something that broadcasts with the tensor `name`: another tensor, or a number."""
        shape = self[name].shape
        other = None if self.one_in(3) else self.pick(lambda t: suits(t) and _broadcasts(t.shape, shape))
        return other or self.number()

    # --- writing

    def attempt(self, kind: Kind) -> None:
        """One statement, if it is possible: its exceptions are for other tests."""
        text = kind(self)
        if text is None:
            return
        is_statement = text.endswith("\n")
        line = text.rstrip("\n") if is_statement else f"v{len(self.program.lines)} = {text}"
        try:
            with np.errstate(all="ignore"):
                exec(line, self.namespace)
        except JitgradError:
            return
        except Exception as error:
            self.program.lines.append(line)
            raise AssertionError(f"{type(error).__name__}: {error}\n\n{self.finish()}") from error
        if not is_statement:
            name = line.split(" ")[0]
            value = self.namespace[name]
            if not isinstance(value, jg.Tensor) or value.numel() > MAX_ELEMENTS:
                del self.namespace[name]
                return
            self.names.append(name)
        self.program.lines.append(line)

    def finish(self) -> Program:
        """Choose the results: the last value, and up to two more."""
        tensors = [n for n in self.names if isinstance(self.namespace[n], jg.Tensor)]
        results = [tensors[-1], *[self.choose(tensors) for _ in range(self.integer(0, 2))]]
        self.program.results = list(dict.fromkeys(results))
        return self.program

    # --- arguments

    def _inputs(self, gradients: bool) -> list[Input]:
        inputs: list[Input] = []
        for _ in range(self.integer(1, 4)):
            inputs.append(self._input(inputs, gradients))
        if self.one_in(5):
            inputs.append(Input(self.choose([0.5, 2, -1.25, 3, 0.0])))
        return inputs

    def _input(self, earlier: Sequence[Input], gradients: bool) -> Input:
        last = earlier[-1] if earlier else None
        if last is not None and self.one_in(10) and last.array.ndim and last.array.shape[0] and last.layout == "dense" \
                and not last.requires_grad:
            return Input(last.array[0], layout="row")
        dtype = self.choose(self.dtypes)
        shape = tuple([self.choose(self.sizes) for _ in range(self.choose([2, 1, 2, 3, 0]))])
        generator = np.random.default_rng(self.integer(0, 1 << 16))
        array = np.asarray(_values(generator, dtype, shape), dtype.numpy)
        if dtype.is_floating_point and array.size and self.one_in(20):
            array.reshape(-1)[0] = self.choose([np.nan, np.inf, -0.0, 1e-40, -np.inf])
        layout = "dense" if not self.one_in(4) else self.choose(["transposed", "strided"])
        return Input(array, gradients and dtype.is_floating_point and not self.one_in(3), layout)


def _values(generator: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    if dtype is jg.bool:
        return generator.random(shape) < 0.5
    if dtype.is_integer:
        return generator.integers(0 if dtype is jg.uint8 else -3, 4, shape)
    if generator.random() < 0.5:                          # many equal ones: comparisons and extremes meet ties
        return generator.integers(-8, 9, shape) / 4
    return generator.standard_normal(shape)


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b)))


# ---- kinds of statements: elementwise --------------------------------------------------------------------------------

UNARY = ["exp", "tanh", "sigmoid", "relu", "sin", "cos", "sqrt", "log", "abs", "neg", "square", "rsqrt", "reciprocal",
         "expm1", "log1p", "erf", "floor", "ceil", "round", "trunc", "sign", "atan", "log2", "exp2", "sinh", "asinh", "frac"]
ACTIVATIONS = ["gelu", "silu", "softplus", "leaky_relu", "elu", "hardtanh", "mish", "softsign", "logsigmoid", "relu6"]


def unary(w: Writer) -> str | None:
    x = w.pick(lambda t: t.dtype is not jg.bool)
    return x and f"{x}.{w.choose(UNARY)}()"


def activation(w: Writer) -> str | None:
    x = w.floating()
    return x and f"F.{w.choose(ACTIVATIONS)}({x})"


def binary(w: Writer) -> str | None:
    x = w.pick()
    if x is None:
        return None
    left, right = x, w.partner(x)
    if w.one_in(3):
        left, right = right, left
    return f"{left} {w.choose(['+', '*', '-', '/', '+', '*', '-', '/', '//', '%', '**'])} {right}"


def binary_function(w: Writer) -> str | None:
    x = w.pick()
    name = w.choose(["maximum", "minimum", "atan2", "fmod", "hypot", "logaddexp"])
    y = x and w.pick(lambda t: _broadcasts(t.shape, w[x].shape))
    return y and f"jg.{name}({x}, {y})"


def comparison(w: Writer) -> str | None:
    x = w.pick()
    return x and f"{x} {w.choose(['<', '<=', '>', '>=', '==', '!='])} {w.partner(x)}"


def logic(w: Writer) -> str | None:
    x = w.pick(lambda t: not t.dtype.is_floating_point)
    if x is None:
        return None
    y = w.pick(lambda t: t.dtype is w[x].dtype and _broadcasts(t.shape, w[x].shape))
    return w.choose([f"~{x}", f"{x} & {y}", f"{x} | {y}", f"{x} ^ {y}"])


def where(w: Writer) -> str | None:
    condition = w.pick(lambda t: t.dtype is jg.bool)
    if condition is None:
        x = w.pick()
        return x and f"jg.where({x} > {w.number()}, {x}, {w.partner(x)})"
    x = w.pick(lambda t: _broadcasts(t.shape, w[condition].shape))
    y = x and w.pick(lambda t: _broadcasts(t.shape, w[condition].shape) and _broadcasts(t.shape, w[x].shape))
    return y and w.choose([f"jg.where({condition}, {x}, {y})", f"{x}.masked_fill({condition}, {w.number()})"])


def clamp(w: Writer) -> str | None:
    x = w.pick(lambda t: t.dtype is not jg.bool)
    return x and w.choose([f"{x}.clamp(-1, 1)", f"{x}.clamp(min={w.number()})", f"{x}.clamp(max={w.number()})"])


def convert(w: Writer) -> str | None:
    x = w.pick()
    return x and f"{x}.to(jg.{w.choose(['float32', 'float64', 'int64', 'bool', 'bfloat16', 'int32', 'float16', 'uint8'])})"


# ---- movement and views ----------------------------------------------------------------------------------------------


def index_text(w: Writer, x: str) -> str:
    """A basic index of the tensor `x`."""
    parts = []
    for size in w[x].shape[:w.integer(1, max(1, w[x].ndim))]:
        if size and w.one_in(3):
            parts.append(str(w.integer(-size, size - 1)))
        else:
            parts.append(w.choose([":", "1:", "::2", ":-1", "None, :", ":2", "1::2"]))
    return ", ".join(parts) or "..."


def movement(w: Writer) -> str | None:
    x = w.pick()
    if x is None:
        return None
    ndim = w[x].ndim
    options = [f"{x}.unsqueeze({w.integer(0, ndim)})", f"{x}.reshape(-1)", f"{x}.clone()"]
    if ndim:
        a, b = w.axis(x), w.axis(x)
        options += [f"{x}[{index_text(w, x)}]", f"{x}.flip({a})", f"{x}.transpose({a}, {b})",
                    f"{x}.unbind({a})[-1]" if w[x].shape[a] else f"{x}.T",
                    f"{x}.roll(1, {a})", f"{x}.select({a}, 0)", f"{x}.narrow({a}, 0, 1)", f"{x}[{index_text(w, x)}]"]
    if ndim >= 2:
        options += [f"{x}.T", f"{x}.mT", f"{x}.flatten()", f"{x}.permute({', '.join(map(str, range(ndim - 1, -1, -1)))})",
                    f"{x}.tril()", f"{x}.reshape({w[x].shape[-1]}, -1)", f"{x}.view(-1, {w[x].shape[0]})"]
    if w.one_in(4):
        options = [f"{x}.expand({w.integer(1, 3)}, {', '.join(['-1'] * ndim)})", f"F.pad({x}, (1, 0))"]
    return w.choose(options)


def join(w: Writer) -> str | None:
    x = w.pick(lambda t: t.ndim > 0)
    if x is None:
        return None
    a = w.axis(x) % w[x].ndim
    rest = [n for k, n in enumerate(w[x].shape) if k != a]
    y = w.pick(lambda t: t.ndim == w[x].ndim and [n for k, n in enumerate(t.shape) if k != a] == rest)
    return f"jg.{'stack' if w[x].shape == w[y].shape and w.one_in(2) else 'cat'}([{x}, {y}], {a})"


# ---- in place --------------------------------------------------------------------------------------------------------

TARGETS = ["{x}", "{x}[{i}]", "{x}.t()", "{x}.T", "{x}[0]", "{x}.view(-1)", "{x}.flip(0)", "{x}.select(-1, 0)", "{x}.mT[0]",
           "{x}.unsqueeze(0)", "{x}[{i}].flip(0)", "{x}.detach()", "{x}.diagonal()"]


def target_of(w: Writer, x: str) -> str:
    return w.choose(TARGETS).format(x=x, i=index_text(w, x) if w[x].ndim else "...")


def in_place(w: Writer) -> str | None:
    x = w.pick()
    if x is None:
        return None
    change = w.choose([f"mul_({w.partner(x)})", f"add_({w.partner(x)})", "zero_()", f"fill_({w.number()})", "relu_()",
                       "neg_()", f"sub_({w.partner(x)})", "tanh_()", f"copy_({w.pick()})", "clamp_(-1, 1)", "exp_()"])
    return f"{target_of(w, x)}.{change}\n"


def assign(w: Writer) -> str | None:
    x = w.pick(lambda t: t.ndim > 0)
    if x is None:
        return None
    index = index_text(w, x)
    if w.one_in(4):
        return f"{x}[{x} > {w.number()}] = {w.number()}\n"
    return f"{x}[{index}] {w.choose(['=', '+=', '*=', '='])} {w.partner(x)}\n"


def assign_part(w: Writer) -> str | None:
    """From one place to another of the same memory, perhaps overlapping."""
    x = w.pick(lambda t: t.ndim > 0 and t.shape[0] > 1)
    return x and w.choose([f"{x}[1:] = {x}[:-1]\n", f"{x}[:-1] += {x}[1:]\n", f"{x}[0] = {x}[-1] * 2\n",
                           f"{x}.flip(0).copy_({x})\n", f"{x}[:, 0] = {x}.sum()\n", f"{x}[::2] = {x}[0]\n"])


# ---- reductions, contractions, indices -------------------------------------------------------------------------------


def reduction(w: Writer) -> str | None:
    x = w.pick()
    if x is None:
        return None
    name = w.choose(["sum", "mean", "amax", "amin", "prod", "sum", "mean", "var", "logsumexp", "norm", "all", "any", "std"])
    if not w[x].ndim or w.one_in(4):
        return f"{x}.{name}()" if name != "logsumexp" else f"{x}.sum()"
    keep = ", keepdim=True" if w.one_in(2) else ""
    if name == "norm":
        return f"{x}.norm(dim={w.axis(x)}{keep})"
    return f"{x}.{name}({w.axis(x)}{keep})"


def row_program(w: Writer) -> str | None:
    x = w.floating(lambda t: t.ndim > 0)
    if x is None:
        return None
    a, n = w.axis(x), w[x].shape[-1]
    return w.choose([f"{x}.softmax({a})", f"{x}.log_softmax({a})", f"F.layer_norm({x}, ({n},))", f"F.rms_norm({x}, ({n},))",
                     f"({x} - {x}.mean({a}, keepdim=True))", f"{x} / {x}.norm(dim={a}, keepdim=True)",
                     f"F.normalize({x}, dim={a})", f"{x}.logsumexp({a})"])


def scan(w: Writer) -> str | None:
    x = w.pick(lambda t: t.ndim > 0)
    if x is None:
        return None
    a = w.axis(x)
    return w.choose([f"{x}.cumsum({a})", f"{x}.argmax({a})", f"{x}.sort({a})[0]", f"{x}.cumprod({a})", f"{x}.argmin({a})",
                     f"{x}.max({a})[0]", f"{x}.topk(1, {a})[0]", f"{x}.argsort({a})"])


def product(w: Writer) -> str | None:
    x = w.floating(lambda t: t.ndim > 0)
    if x is None:
        return None
    inner, dtype = w[x].shape[-1], w[x].dtype
    fits = w.pick(lambda t: t.dtype is dtype and t.ndim > 0 and t.shape[-2 if t.ndim > 1 else -1] == inner)
    turned = w.pick(lambda t: t.dtype is dtype and t.ndim == 2 and t.shape[-1] == inner)
    options = [f"{x} @ {fits}"] if fits else []
    options += [f"{x} @ {turned}.T", f"F.linear({x}, {turned})"] if turned else []
    options += [f"{x} @ {x}.mT"] if w[x].ndim > 1 else []
    return w.choose(options) if options else None


def indexing(w: Writer) -> str | None:
    x = w.pick(lambda t: t.ndim > 0 and t.shape[0] > 0)
    if x is None:
        return None
    n = w[x].shape[0]
    i = w.pick(lambda t: t.dtype is jg.int64)
    positions = f"{i} % {n}" if i and not w.one_in(8) else f"jg.arange({n})"
    flat = f"({positions}).reshape(-1)"
    return w.choose([f"{x}[{positions}]", f"{x}.index_select(0, {flat})", f"F.embedding({positions}, {x})",
                     f"{x}.index_add(0, jg.arange({n}), {x})", f"F.one_hot({positions}, {n})",
                     f"{x}.gather(0, ({positions}).expand({', '.join(map(str, w[x].shape))}))",
                     f"{x}.take({flat})", f"jg.zeros_like({x}).scatter_add(0, jg.zeros_like({x}, dtype=jg.int64), {x})"])


def loss(w: Writer) -> str | None:
    x = w.floating()
    if x is None:
        return None
    y = w.floating(lambda t: t.shape == w[x].shape)
    options = [f"F.mse_loss({x}, {y})", f"F.smooth_l1_loss({x}, {y})",
               f"F.binary_cross_entropy_with_logits({x}, {y}.sigmoid())"]
    if w[x].ndim == 2 and w[x].shape[1]:
        n, c = w[x].shape
        options += [f"F.cross_entropy({x}, jg.arange({n}) % {c})"] * 3
        options += [f"F.nll_loss({x}.log_softmax(1), jg.arange({n}) % {c}, ignore_index=0)"]
    return w.choose(options)


# ---- numbers, branches, gradients ------------------------------------------------------------------------------------


def arithmetic_on_numbers(w: Writer) -> str | None:
    x = w.pick(lambda t: t.dtype is not jg.bool)
    n = w.number()
    return x and w.choose([f"{x} * ({n} * 2 + 1)", f"{x} / ({n} - 7)", f"{x} + {n} / {x}.numel()", f"jg.full((2,), {n})",
                           f"jg.full_like({x}, {n})", f"{x} * -{n}"])


def branch(w: Writer) -> str | None:
    """A value that Python reads: what follows is another graph."""
    x = w.pick(lambda t: t.numel() > 0)
    return x and f"{x} * 2 if {x}.sum() > {w.number()} else {x} + 1"


def backward(w: Writer) -> str | None:
    """Once per program: gradients, which the next statements can use."""
    x = w.floating(lambda t: t.requires_grad)
    if x is None or w.went_back:
        return None
    w.went_back = True
    return f"{x}.float().sum().backward()\n" if w.one_in(3) else f"({x} * {x}).sum().backward()\n"


def gradient(w: Writer) -> str | None:
    leaves = [n for n in w.program.names if isinstance(w.namespace[n], jg.Tensor) and w[n].grad is not None]
    if leaves:
        return f"{w.choose(leaves)}.grad"
    x = w.floating(lambda t: t.requires_grad and t.grad_fn is not None)
    wanted = [n for n in w.program.names if isinstance(w.namespace[n], jg.Tensor) and w[n].requires_grad]
    if x is None or not wanted:
        return None
    create = ", create_graph=True" if w.one_in(2) else ", retain_graph=True"
    return f"jg.autograd.grad(({x} * {x}).sum(), {w.choose(wanted)}, allow_unused=True{create})[0]"


def update(w: Writer) -> str | None:
    """What optimizers do."""
    leaves = [n for n in w.program.names if isinstance(w.namespace[n], jg.Tensor) and w[n].grad is not None]
    if not leaves:
        return None
    p = w.choose(leaves)
    rate = w.number()
    return w.choose([f"with jg.no_grad(): {p} -= {rate} * {p}.grad\n", f"with jg.no_grad(): {p}.sub_({p}.grad * 0.1)\n",
                     f"jg.optim.SGD([{p}], lr=0.1, momentum=0.9).step()\n", f"jg.optim.Adam([{p}], lr=0.01).step()\n",
                     f"{p}.grad.mul_(0.5)\n", f"{p}.grad = None\n",
                     f"jg.nn.utils.clip_grad_norm_([{p}], 1.0)\n"])


# ---- families --------------------------------------------------------------------------------------------------------

MOST = (jg.float32, jg.float32, jg.float32, jg.float64, jg.int64, jg.bool)
NARROW = (jg.bfloat16, jg.float16, jg.float32, jg.int32, jg.uint8)
REAL = (jg.float32, jg.float32, jg.float64)

FAMILIES: dict[str, tuple[tuple[Any, ...], bool, list[Kind]]] = {
    "elementwise": (MOST, False, [unary, binary, binary, binary_function, comparison, where, convert, activation, logic,
                                  clamp, arithmetic_on_numbers]),
    "narrow": (NARROW, False, [unary, binary, binary, convert, activation, reduction, row_program, movement, where,
                             product]),
    "views": (MOST, False, [movement, movement, movement, join, binary, unary, reduction]),
    "in_place": (MOST, False, [in_place, in_place, assign, assign_part, movement, binary, unary, movement]),
    "rows": (REAL, False, [row_program, row_program, reduction, binary, unary, movement, loss, scan]),
    "indexing": (MOST, False, [indexing, indexing, scan, product, binary, movement, where, assign]),
    "gradients": (REAL, True, [unary, binary, binary, activation, row_program, reduction, movement, product, loss, where,
                               indexing, gradient, scan]),
    "training": (REAL, True, [product, binary, activation, loss, backward, gradient, update, update, reduction, row_program,
                              in_place, movement]),
    "mixed": ((*MOST, jg.bfloat16), True, [unary, binary, reduction, movement, in_place, assign, row_program, product, where,
                                           branch, indexing, convert, backward, gradient, update, scan, join,
                                           arithmetic_on_numbers]),
}


@st.composite
def programs(draw: Callable[[Any], Any], family: str) -> Program:
    """A program of at most nine statements."""
    dtypes, gradients, kinds = FAMILIES[family]
    writer = Writer(draw, dtypes, gradients)
    for _ in range(writer.integer(1, 9)):
        writer.attempt(writer.choose(kinds))
    return writer.finish()
