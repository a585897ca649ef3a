"""The kernel of the time steps of a recurrent layer on a GPU, forward and backward: products of states with the recurrent
weights, and behind them, in the same kernel, the gates and the new states.

What goes in: a `Form` and the memory of each operand, by name. What comes out: a kernel of which a block of 256 threads has
some rows of the batch and goes, for every step that it is launched for, over tiles of units. Each of its eight warps
multiplies an eighth of the depth: states come through shared memory, weights in wide accesses straight from the caches into
registers, packed so that a lane has next to each other all that it needs of a unit (`kernels.cuda.recurrence`). What the
warps have summed up meets in shared memory; there a thread takes one unit of one row and finishes it.

Blocks do not wait for each other. A launch for all steps has blocks that have all units of their rows; then one barrier of a
block is all that lies between two steps. A launch for one step may have any tiles. Sums are made in an order that the shape
decides. States of 16-bit floats that are carried from step to step unit by unit are kept in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jitgrad.codegen.cuda_templates import THREADS, pack, share
from jitgrad.codegen.kernel import Buffer, CudaLaunch, Let, Load, Operand, Store, When
from jitgrad.codegen.writer import Writer, compute_dtype
from jitgrad.dtypes import DType
from jitgrad.ir.axes import Axes

WARP, WARPS = 32, THREADS // 32
PIECE = THREADS
"""States that are in shared memory at once, of each row: a thread fetches one of each."""

GATES = {"rnn": 1, "lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Form:
    """What the text of a kernel depends on. `rows` of a block, `units` of a lane; `given`: products were made before, by
    another kernel."""

    kind: str
    backward: bool
    dtype: DType
    rows: int
    units: int
    relu: bool = False
    given: bool = False
    aligned: bool = True

    @property
    def gates(self) -> int:
        """Sums that make a unit: backward there is one, the gradient of its state."""
        return 1 if self.backward else GATES[self.kind]

    @property
    def columns(self) -> int:
        """Sums of a lane for each row."""
        return self.gates * self.units

    @property
    def lanes(self) -> int:
        """Elements of packed weights of a lane: as many as one access or several take."""
        return 1 << (self.columns - 1).bit_length()

    @property
    def sum_dtype(self) -> DType:
        return compute_dtype(self.dtype)

    @property
    def name(self) -> str:
        parts = [self.kind, *["relu"] * self.relu, *["grad"] * self.backward, "cell" if self.given else "steps",
                 f"{self.rows}x{self.units}", self.dtype.short]
        return "_".join(parts)


class Steps:
    """One kernel in the making. `buffers`: operands by the names that the op gives them; `w` are packed weights; `products`
    are given; `carry` is what goes from step to step unit by unit, where no result of the op does that."""

    def __init__(self, form: Form, buffers: dict[str, Buffer], dtypes: dict[str, DType]):
        self.form = form
        self.writer = Writer(Axes(), {}, {})
        for name, buffer in buffers.items():
            self.writer.operands[buffer] = Operand(name, dtypes.get(name, form.dtype), "")
        self.carries = "carry" in buffers
        self.cells = {"rnn": self.rnn, "lstm": self.lstm, "gru": self.gru, "rnn_grad": self.rnn_grad,
                      "lstm_grad": self.lstm_grad, "gru_grad": self.gru_grad}

    def launches(self, parts: Iterable[tuple[int, int]], grid: int, wide: bool, **numbers: int) -> list[CudaLaunch]:
        """A launch for each part of the steps: the first one and the one behind the last. Of `numbers` there are ``steps,
        batch, hidden``; ``row_tiles``, of which a block has one, and the ``tiles`` of units that it has."""
        self.writer.sizes.update(first=0, last=0, **numbers)
        self.write()
        kernel, arguments = self.writer.kernel(self.form.name)
        made, place = pack(kernel, arguments, grid, THREADS, self.form.aligned, wide), len(kernel.operands)
        return [replace(made, arguments=(*arguments[:place], *part, *arguments[place + 2:])) for part in parts]

    # ---- words

    def value(self, name: str, text: str) -> None:
        """A number of the type that sums have."""
        self.writer.emit(Let(name, self.form.sum_dtype, text))

    def load(self, name: str, operand: str, index: str) -> None:
        self.writer.emit(Load(name, operand, index))

    def load_if(self, name: str, *places: tuple[str, str, str]) -> None:
        """From the first operand and index whose condition holds; zero if there is none."""
        self.value(name, "0")
        for condition, operand, index in places:
            self.writer.emit(When(condition, [Load(name, operand, index)]))

    def store(self, operand: str, index: str, name: str) -> None:
        self.writer.emit(Store(operand, index, name))

    def barrier(self) -> None:
        self.writer.emit(Let("_", None, "barrier()"))

    # ---- the frame

    def write(self) -> None:
        writer, form = self.writer, self.form
        writer.let("lane", f"thread() % {WARP}")
        writer.let("warp", f"thread() // {WARP}")
        writer.let("first_row", f"block() % row_tiles * {form.rows}")
        writer.let("row", "first_row + warp")
        writer.let("own", "row * hidden")
        if not form.given:
            self.states = share(writer, form.sum_dtype, form.rows * PIECE)
            self.parts = share(writer, form.sum_dtype, WARPS * form.rows * form.columns * WARP)
            depth = f"hidden * {GATES[form.kind]}" if form.backward else "hidden"
            writer.let("padded_depth", f"({depth} + {WARP - 1}) // {WARP} * {WARP}")
        writer.open("n", "first", "last")
        writer.let("t", "steps - n - 1" if form.backward else "n")
        if not form.given:
            writer.let("depth", f"{depth} if n > 0 else 0" if form.backward else depth)
        writer.open("number", "0", "tiles")
        writer.let("tile", "block() // row_tiles * tiles + number")
        if not form.given:
            self.multiply()
        self.finish()
        writer.close(2)

    # ---- products

    def sums(self) -> list[tuple[int, int]]:
        return [(r, p) for r in range(self.form.rows) for p in range(self.form.columns)]

    def multiply(self) -> None:
        """Leaves the sums of each warp in shared memory."""
        writer, form = self.writer, self.form
        for r, p in self.sums():
            self.value(f"sum{r}_{p}", "0")
        writer.open("piece", "0", f"(depth + {PIECE - 1}) // {PIECE}")
        writer.let("start", f"piece * {PIECE}")
        writer.enter(When(f"number == 0 or depth > {PIECE}"))
        self.barrier()
        self.fetch()
        self.barrier()
        writer.close()
        writer.let("share", f"(min(depth - start, {PIECE}) + {WARP - 1}) // {WARP}")
        writer.open("q", "0", "share")
        writer.let("k", "(warp * share + q) * 4")
        for r in range(form.rows):
            self.load_pieces([f"a{r}_{i}" for i in range(4)], self.states, f"k + {r * PIECE}")
        writer.let("place", f"((tile * padded_depth + start + k) * {WARP} + lane) * {form.lanes}")
        for i in range(4):
            names = [f"w{i}_{p}" for p in range(form.lanes)]
            self.load_pieces(names, "w", f"place + {i * WARP * form.lanes}")
        for i in range(4):
            for r, p in self.sums():
                writer.let(f"sum{r}_{p}", f"multiply_add(a{r}_{i}, w{i}_{p}, sum{r}_{p})")
        writer.close(2)
        self.barrier()
        for r, p in self.sums():
            self.store(self.parts, f"(warp * {form.rows * form.columns} + {r * form.columns + p}) * {WARP} + lane",
                       f"sum{r}_{p}")
        self.barrier()

    def load_pieces(self, names: list[str], operand: str, index: str) -> None:
        """Neighbouring elements, as many at once as fit into 16 bytes: shared and scratch memory begin at round addresses,
        wherever operands do."""
        dtype = self.form.sum_dtype if operand == self.states else self.form.dtype
        width = min(len(names), 16 // dtype.itemsize)
        for first in range(0, len(names), width):
            self.writer.emit(Load(", ".join(names[first:first + width]), operand, f"{index} + {first}", width))

    def fetch(self) -> None:
        """States of all rows into shared memory, zeros where there are none. Backward these are gradients of the gates."""
        writer, form = self.writer, self.form
        writer.let("k", "start + thread()")
        for r in range(form.rows):
            writer.let("line", f"first_row + {r}")
            there = "k < depth and line < batch"
            if form.backward:
                source = "d_hidden" if form.kind == "gru" else "d_gates"
                self.load_if(f"state{r}", (there, source, f"((t + 1) * batch + line) * hidden * {GATES[form.kind]} + k"))
            else:
                self.load_if(f"state{r}", (f"{there} and n == 0", "h0", "line * hidden + k"),
                             (f"{there} and n > 0", "h", "((n - 1) * batch + line) * hidden + k"))
        for r in range(form.rows):
            self.store(self.states, f"thread() + {r * PIECE}", f"state{r}")

    # ---- what follows

    def finish(self) -> None:
        """A thread has one unit of one row, or some that are 32 apart."""
        writer, form = self.writer, self.form
        writer.enter(When("row < batch" if form.rows == WARPS else f"warp < {form.rows} and row < batch"))
        writer.open("u", "0", str(form.units))
        writer.let("unit", f"(tile * {form.units} + u) * {WARP} + lane")
        writer.enter(When("unit < hidden"))
        for g in range(form.gates):
            self.total(g)
        writer.let("state", "(t * batch + row) * hidden + unit")
        writer.let("gate", f"(t * batch + row) * hidden * {GATES[form.kind]} + unit")
        self.cells[f"{form.kind}{'_grad' * form.backward}"]()
        writer.close(3)

    def total(self, g: int) -> None:
        """Sum number g of a unit."""
        form = self.form
        if form.given:
            place = f"row * hidden * {form.gates} + hidden * {g} + unit"
            self.load_if(f"total{g}", ("n > 0" if form.backward else "True", "products", place))
            return
        self.value(f"total{g}", "0")
        self.writer.open("other", "0", str(WARPS))
        place = f"((other * {form.rows} + warp) * {form.columns} + u * {form.gates} + {g}) * {WARP} + lane"
        self.load("part", self.parts, place)
        self.value(f"total{g}", f"total{g} + part")
        self.writer.close()

    def before(self, result: str, initial: str) -> None:
        """A state that is carried unit by unit, as it was before step t."""
        carried = ("n > 0", "carry", "own + unit") if self.carries else ("n > 0", result, "state - batch * hidden")
        self.load_if("before", ("n == 0", initial, "own + unit"), carried)

    def keep(self, name: str) -> None:
        if self.carries:
            self.store("carry", "own + unit", name)

    # ---- forward: `total0` … are the products of the gates

    def rnn(self) -> None:
        self.load("x", "gates", "gate")
        self.value("h_t", f"{'relu' if self.form.relu else 'tanh'}({self.form.sum_dtype.short}(x + total0))")
        self.store("h", "state", "h_t")
        if self.form.given:
            self.store("latest", "own + unit", "h_t")

    def lstm(self) -> None:
        kind = self.form.sum_dtype.short
        for g, (name, function) in enumerate(zip("ifgo", ("sigmoid", "sigmoid", "tanh", "sigmoid"), strict=True)):
            self.load("x", "gates", f"gate + hidden * {g}")
            self.value(f"{name}_t", f"{function}({kind}(x + total{g}))")
            self.store("kept", f"gate + hidden * {g}", f"{name}_t")
        self.before("c", "c0")
        self.value("c_t", "f_t * before + i_t * g_t")
        self.value("h_t", "o_t * tanh(c_t)")
        self.store("c", "state", "c_t")
        self.store("h", "state", "h_t")
        self.keep("c_t")
        if self.form.given:
            self.store("latest", "own + unit", "h_t")

    def gru(self) -> None:
        kind = self.form.sum_dtype.short
        for g, name in enumerate("rzn"):
            self.load("bias", "b", f"unit + hidden * {g}")
            self.value(f"{name}_h", f"total{g} + bias")
            self.load(f"{name}_x", "gates", f"gate + hidden * {g}")
        self.value("r_t", f"sigmoid({kind}(r_x + r_h))")
        self.value("z_t", f"sigmoid({kind}(z_x + z_h))")
        self.value("n_t", f"tanh({kind}(n_x + r_t * n_h))")
        for k, name in enumerate(("r_t", "z_t", "n_t", "n_h")):
            self.store("kept", f"state + (t * batch + row) * hidden * 3 + hidden * {k}", name)
        self.before("h", "h0")
        self.value("h_t", "n_t + z_t * (before - n_t)")
        self.store("h", "state", "h_t")
        self.keep("h_t")
        if self.form.given:
            self.store("latest", "own + unit", "h_t")

    # ---- backward: `total0` is what comes to the state from the step behind; after all steps there is one more, without
    # gates, whose state is the first one

    def rnn_grad(self) -> None:
        kind = self.form.sum_dtype.short
        self.writer.enter(When("n < steps"))
        self.load("dh_t", "dh", "state")
        self.load("h_t", "h", "state")
        slope = f"{kind}(h_t > {kind}(0))" if self.form.relu else f"({kind}(1) - h_t * h_t)"
        self.value("d", f"(dh_t + total0) * {slope}")
        self.gradients(["d"], 1)
        self.writer.close()
        self.writer.emit(When("n == steps", [Store("dh0", "own + unit", "total0")]))

    def lstm_grad(self) -> None:
        one = f"{self.form.sum_dtype.short}(1)"
        self.writer.enter(When("n < steps"))
        for g, name in enumerate("ifgo"):
            self.load(f"{name}_t", "kept", f"gate + hidden * {g}")
        self.load("dh_t", "dh", "state")
        self.load("dc_t", "dc", "state")
        self.load("c_t", "c", "state")
        self.load_if("before", ("t == 0", "c0", "own + unit"), ("t > 0", "c", "state - batch * hidden"))
        carry = "carry" if self.carries else "dc0"
        self.load_if("carried", ("n > 0", carry, "own + unit"))
        self.value("squashed", "tanh(c_t)")
        self.value("d", "dh_t + total0")
        self.value("cell", f"dc_t + carried + d * o_t * ({one} - squashed * squashed)")
        self.value("d_i", f"cell * g_t * i_t * ({one} - i_t)")
        self.value("d_f", f"cell * before * f_t * ({one} - f_t)")
        self.value("d_g", f"cell * i_t * ({one} - g_t * g_t)")
        self.value("d_o", f"d * squashed * o_t * ({one} - o_t)")
        self.gradients(["d_i", "d_f", "d_g", "d_o"], 4)
        self.value("passed", "cell * f_t")
        self.store(carry, "own + unit", "passed")
        self.writer.close()
        self.writer.enter(When("n == steps"))
        self.store("dh0", "own + unit", "total0")
        if self.carries:
            self.load("carried", "carry", "own + unit")
            self.store("dc0", "own + unit", "carried")
        self.writer.close()

    def gru_grad(self) -> None:
        one = f"{self.form.sum_dtype.short}(1)"
        carry = "carry" if self.carries else "dh0"
        self.load_if("carried", ("n > 0", carry, "own + unit"))
        self.writer.enter(When("n < steps"))
        for k, name in enumerate(("r_t", "z_t", "n_t", "n_h")):
            self.load(name, "kept", f"state + (t * batch + row) * hidden * 3 + hidden * {k}")
        self.load("dh_t", "dh", "state")
        self.load_if("before", ("t == 0", "h0", "own + unit"), ("t > 0", "h", "state - batch * hidden"))
        self.value("d", "dh_t + carried + total0")
        self.value("d_n", f"d * ({one} - z_t) * ({one} - n_t * n_t)")
        self.value("d_r", f"d_n * n_h * r_t * ({one} - r_t)")
        self.value("d_z", f"d * (before - n_t) * z_t * ({one} - z_t)")
        self.value("d_h", "d_n * r_t")
        for g, name in enumerate(("d_r", "d_z", "d_n")):
            self.store("d_gates", f"gate + hidden * {g}", name)
        self.gradients(["d_r", "d_z", "d_h"], 3, "d_hidden")
        self.value("passed", "d * z_t")
        self.store(carry, "own + unit", "passed")
        self.writer.close()
        self.writer.enter(When("n == steps"))
        self.value("passed", "carried + total0")
        self.store("dh0", "own + unit", "passed")
        self.writer.close()

    def gradients(self, names: list[str], gates: int, operand: str = "d_gates") -> None:
        """Store what the next step multiplies with the weights."""
        for g, name in enumerate(names):
            self.store(operand, f"gate + hidden * {g}", name)
            if self.form.given:
                self.store("latest", f"own * {gates} + hidden * {g} + unit", name)
