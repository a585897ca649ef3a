"""Bad input: right results or a clear error of ours, never a wrong number, a hang, a crash, or somebody else's traceback.

Eager and compiled raise the same, with the user's line, and leave every tensor as it was."""

import linecache
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from programs import plain_plan, plans_made_by

import jitgrad as jg
from jitgrad import errors
from jitgrad.nn import functional as F

# ---- misuse: the same error, eager and compiled ----------------------------------------------------------------------

MISUSE = {
    "ShapeError": [
        "x @ y", "x + y", "x * i", "x.reshape(4, 2)", "x.view(5)", "x.view(-1, -1)", "jg.zeros(2, -3)",
        "jg.full((-1,), 2.0)", "x.expand(4, 3)", "jg.cat([x, y])", "jg.stack([x, y])", "e.amax(0)", "e.max()",
        "F.cross_entropy(x, i)",
        "F.layer_norm(x, (4,))", "F.linear(x, y)", "x.mm(x)", "x.bmm(y)", "jg.einsum('ij,jk->ik', x, x)", "F.mse_loss(x, y)",
        "F.cross_entropy(x, x.sum(1))", "x.unflatten(1, (2, 2))", "x.narrow(1, 2, 5)", "F.conv2d(x, y)",
        "x.add_(y)", "x.copy_(y)", "F.embedding(i, s)",
        "jg.where(b, x, y)", "x.chunk(0)", "jg.zeros(2, 2).expand(-1, -1, -1)",
        "F.conv3d(x, y)", "F.conv2d(x[None, None], x[None, None, :, :2].repeat(1, 1, 2, 1))", "F.max_pool3d(x, 2)",
        "F.max_pool2d(x[None], 9)", "F.avg_pool2d(x[None], 2, padding=2)", "F.interpolate(x[None], 3, mode='bicubic')",
        "F.grid_sample(x, x)", "F.fold(x, 3, 2)", "F.instance_norm(x)", "F.max_unpool1d(x, i, 2)", "F.pixel_shuffle(x, 2)",
        "F.pad(x, (1, 1), mode='mirror')", "x.histc(0)", "x.histc(3, 2, 1)", "(x / 0).histc(3)",
        "x.quantile(1.5)", "x.quantile(0.5, interpolation='cubic')", "e.quantile(0.5)", "x.cov(fweights=i)", "x.hsplit(2)",
        "x.matrix_power(2)", "jg.vander(x)",
        "x.select_scatter(x, 0, 1)", "x.slice_scatter(y)", "x.diagonal_scatter(x)",
        "x.scatter_reduce(1, x.long(), x, 'median')", "x.index_reduce(0, i, x, 'mean')",
        "x.put(i, s)", "x.sum_to_size(2, 2)",
        "jg.trapezoid(x, x, dx=1)", "x.is_nonzero()", "jg.hann_window(-1)",
    ],
    "IndexError": [
        "x.sum(5)", "x.transpose(0, 2)", "x[5]", "x[:, 7]", "x[0, 0, 0]", "x.softmax(3)", "x.squeeze(9)", "x.unsqueeze(5)",
        "x.sort(7)", "x.select(0, 9)", "x.flip(4)", "x.cumsum(2)", "s.select(0, 0)", "x[jg.tensor([9])]",
        "x[jg.tensor([-3])]", "x.index_select(0, jg.tensor([9]))", "x.gather(1, jg.tensor([[9]]))",
        "F.embedding(jg.tensor([9]), x)",
        "F.cross_entropy(x, jg.tensor([0, 9]))", "F.nll_loss(x, jg.tensor([-1, 0]))",
        "x.scatter_add(1, jg.tensor([[3]]), x)", "x.index_add(0, jg.tensor([5]), x[:1])", "x.take(jg.tensor([6]))",
        "x.index_add(0, jg.tensor([-1]), x[:1])", "F.max_unpool1d(x[None], x[None].long() + 9, 2)",
        "x.unique(dim=4)",
        "x.cummax(3)", "x.quantile(0.5, 4)", "x.select_scatter(x[0], 0, 9)", "x.mode(7)",
    ],
    "DTypeError": [
        "~x", "x & x", "b - b", "F.embedding(x, y)", "x.index_select(0, x)", "i.requires_grad_()", "i.add_(1.5)",
        "x.masked_fill(x, 0)", "i.softmax(0)", "x << 1", "i.mean()", "x.gather(1, x)",
        "b.neg()", "x.long() @ x", "F.conv2d(x[None, None], x[None, None].double())", "F.avg_pool1d(i[None], 2)",
        "x.polygamma(-1)", "jg.polygamma(1.5, x)",
        "jg.gcd(x, x)", "jg.complex(x, i)", "i.quantile(0.5)", "jg.unravel_index(x, (2, 3))", "x.imag", "i.frexp()",
    ],
    "DivisionByZeroError": ["i // 0", "i % (i - i)", "i // (i - i)", "i.fmod(i - i)"],
    "DeviceError": ["x.to('cuda:99')", "jg.zeros(2, device='gpu')", "x.cuda('cpu')", "x.to('meta')"],
    "AutogradError": ["x.sum().backward()", "(w * 2).backward()", "w.add_(1)", "w[0].mul_(2)", "jg.autograd.grad(s, w)"],
}
ROWS = [(kind, text) for kind, texts in MISUSE.items() for text in texts]


def operands():
    return {"x": jg.arange(6.0).reshape(2, 3), "y": jg.ones(4, 2), "i": jg.arange(4), "b": jg.ones(2, 3) > 0,
            "e": jg.zeros(0, 3), "s": jg.tensor(1.5), "w": jg.ones(3, requires_grad=True)}


def written(text):
    """A function of the operands whose second line is `text`, in a file that tracebacks can show."""
    source = f"def misuse({', '.join(operands())}):\n    return {text}\n"
    linecache.cache["user.py"] = (len(source), None, source.splitlines(keepends=True), "user.py")
    namespace = {"jg": jg, "F": F}
    exec(compile(source, "user.py", "exec"), namespace)
    return namespace["misuse"]


def raised_by(function):
    """The exception, after a look at the operands: nothing has changed."""
    given = operands()
    with pytest.raises(Exception) as caught:
        result = function(**given)
        [t.numpy(force=True) for t in (result if isinstance(result, tuple) else (result,))]
    for name, tensor in operands().items():
        np.testing.assert_array_equal(given[name].numpy(force=True), tensor.numpy(force=True), err_msg=name)
    return caught.value


@pytest.mark.parametrize(("kind", "text"), ROWS, ids=[text for _, text in ROWS])
def test_misuse_is_a_clear_error(kind, text):
    error = raised_by(written(text))
    wanted = IndexError if kind == "IndexError" else getattr(errors, kind)
    assert isinstance(error, wanted) and isinstance(error, errors.JitgradError), repr(error)
    assert re.match(r"[\w -]+: ", str(error)), f"names no op: {error}"
    assert "(user.py:2)" in str(error), f"has no line: {error}"


@pytest.mark.parametrize(("kind", "text"), ROWS, ids=[text for _, text in ROWS])
def test_compiled_misuse_is_the_same_error(kind, text):
    eager = raised_by(written(text))
    with plans_made_by(plain_plan):
        compiled = raised_by(jg.compile(written(text)))
    assert type(compiled) is type(eager), repr(compiled)
    assert "(user.py:2)" in str(compiled), f"has no line: {compiled}"


# ---- an index out of range in a compiled step ------------------------------------------------------------------------

ROWS_OF_TABLE, CLASSES = 6, 4


def embedding_step(model, optimizer):
    def step(index, target):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(index), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def gather_step(model, optimizer):
    def step(index, target):
        optimizer.zero_grad()
        scores = model(index.clamp(0, ROWS_OF_TABLE - 1))
        loss = scores.gather(1, target.unsqueeze(1)).sum() + scores[target].sum()
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("make", [embedding_step, gather_step])
@pytest.mark.parametrize(("index", "target"), [([0, 9], [0, 1]), ([0, 1], [0, 5]), ([0, 1], [77, 0]), ([-7, 1], [0, 0])])
@pytest.mark.parametrize("good_calls", [0, 1, 4])
def test_index_out_of_range_in_a_step(make, index, target, good_calls):
    if make is gather_step and max(target) < CLASSES:
        pytest.skip("that index is clamped")
    model = jg.nn.Sequential(jg.nn.Embedding(ROWS_OF_TABLE, 3), jg.nn.Linear(3, CLASSES))
    optimizer = jg.optim.Adam(model.parameters())
    step = make(model, optimizer)
    compiled = jg.compile(step)
    for _ in range(good_calls):
        compiled(jg.tensor([0, 1]), jg.tensor([0, 1]))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(errors.OutOfRangeError) as caught:
        compiled(jg.tensor(index), jg.tensor(target))
    assert "test_bad_input.py" in str(caught.value)
    for p, old in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), old.numpy())
    assert np.isfinite(compiled(jg.tensor([0, 1]), jg.tensor([0, 1])).item())
    with pytest.raises(errors.OutOfRangeError):
        step(jg.tensor(index), jg.tensor(target))


# ---- odd values and odd memory ---------------------------------------------------------------------------------------


def normalized(x):
    return x.softmax(-1), F.layer_norm(x, x.shape[-1:]), x.amax(-1), x.argmax(-1), x.sum(), x.relu(), x.cumsum(-1)


ODD_VALUES = {
    "nan": [[1.0, np.nan, 2.0], [0.0, 1.0, 2.0]], "inf": [[1.0, np.inf, 2.0], [0.0, -np.inf, 2.0]],
    "only -inf": [[-np.inf] * 3, [0.0, 0.0, 0.0]], "huge": [[3e38, 3e38, -3e38], [1e-45, -0.0, 1e-38]]}


@pytest.mark.parametrize("values", ODD_VALUES.values(), ids=ODD_VALUES)
def test_nan_inf_and_denormals(values):
    x = jg.tensor(values, dtype=jg.float32)
    compiled = jg.compile(normalized)
    with np.errstate(all="ignore"):
        for eager, found in zip(normalized(x), compiled(x), strict=True):
            np.testing.assert_allclose(found.numpy(), eager.numpy(), rtol=1e-5)


BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 10
ODD_MEMORY = {
    "dense": lambda: BASE.copy(), "transposed": lambda: BASE.copy().T, "every other": lambda: BASE.copy()[::2, 1::2],
    "backwards": lambda: BASE.copy()[::-1, ::-1], "repeated": lambda: np.broadcast_to(BASE[:1], (4, 6)),
    "0-d": lambda: np.array(2.5, np.float32), "one element": lambda: np.full((1, 1), 2.5, np.float32),
    "empty": lambda: np.zeros((0, 6), np.float32), "no columns": lambda: np.zeros((3, 0), np.float32),
    "unaligned": lambda: np.frombuffer(b"\0" * 2 + BASE.tobytes(), np.float32, offset=2).copy().reshape(4, 6),
    "read-only": lambda: read_only(BASE.copy())}


def read_only(array):
    array.flags.writeable = False
    return array


def scaled(x, y):
    z = (x * 2 + y).exp()
    return z.sum(), z, x.reshape(-1) * 3


def test_one_compiled_function_takes_all_memory_layouts():
    """Replayed and sealed, in any order."""
    compiled = jg.compile(scaled)
    for _ in range(3):
        for name, make in ODD_MEMORY.items():
            x = jg.from_numpy(make())
            for eager, found in zip(scaled(x, 0.5), compiled(x, 0.5), strict=True):
                np.testing.assert_allclose(found.numpy(), eager.numpy(), rtol=1e-5, err_msg=name)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["read-only", "repeated"])
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_that_may_not_be_written_is_not(name, compiled):
    def change(x):
        x.add_(1)
        return x * 2

    change = jg.compile(change) if compiled else change
    array = ODD_MEMORY[name]()
    before = array.copy()
    for _ in range(3):
        with pytest.raises(errors.JitgradError, match=r"in-place|in place"):
            change(jg.from_numpy(array))
    np.testing.assert_array_equal(array, before)


def mixed(a, b):
    a.add_(1)
    out = a * 10 + b.sum()
    b.mul_(2)
    return out, b + 0.5


ALIASES = {
    "unrelated": lambda m: (m, m.clone()), "the same": lambda m: (m, m), "a row": lambda m: (m, m[0]),
    "the transpose": lambda m: (m, m.t()), "overlapping rows": lambda m: (m[:2], m[1:]),
    "an alias": lambda m: (m, m.detach()), "another shape": lambda m: (m, m.view(-1)),
    "through NumPy": lambda m: (m, jg.from_numpy(m.numpy())), "backwards": lambda m: (m, jg.from_numpy(m.numpy()[::-1])),
    "every other": lambda m: (m[::2], m[1::2]), "a column": lambda m: (m[:, 0], m)}


def test_arguments_that_share_memory():
    """Every pattern after every other one, until each has been sealed."""
    compiled = jg.compile(mixed)
    for name in [*ALIASES, *ALIASES, *reversed(ALIASES), *ALIASES]:
        ours, theirs = (jg.from_numpy(BASE[:3, :3].copy()) for _ in range(2))
        found, wanted = compiled(*ALIASES[name](ours)), mixed(*ALIASES[name](theirs))
        for x, y in zip((*found, ours), (*wanted, theirs), strict=True):
            np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=1e-6, err_msg=name)


# ---- the cache, end to end -------------------------------------------------------------------------------------------

STEP = """
import sys
import numpy as np
import jitgrad as jg
from jitgrad.runtime import build

weights = jg.tensor(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), requires_grad=True)

@jg.compile
def step(x):
    loss = (x @ weights).tanh().softmax(1).square().sum()
    loss.backward()
    return loss

for n in (2, 5):
    weights.grad = None
    loss = step(jg.arange(3.0 * n).reshape(n, 3) / 10)
    print(f"{loss.item():.5f} {weights.grad.sum().item():.4f} {weights.grad.abs().sum().item():.4f}")
print(build.compiled, "numba" in sys.modules, file=sys.stderr)
"""


def start(folder):
    environment = {**os.environ, "JITGRAD_CACHE": str(folder), "PYTHONWARNINGS": "default"}
    return subprocess.Popen([sys.executable, "-c", STEP], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process):
    """What it printed; it may warn but must not fail."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    return out, err


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache folder that one run has filled, and what that run printed."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    out, err = finish(start(folder))
    assert not err.splitlines()[-1].startswith("0 "), "compiled nothing"
    return folder, out


def files(folder):
    return [f for f in sorted(Path(folder).rglob("*")) if f.is_file()]


def test_a_second_process_compiles_nothing(filled):
    folder, expected = filled
    out, err = finish(start(folder))
    assert out == expected and err.splitlines()[-1] == "0 False"


DAMAGE = {"cut short": lambda data: data[:len(data) // 2], "emptied": lambda data: b"",
          "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
          "something else": lambda data: b"\x7fELF" + os.urandom(200)}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_rebuilt(filled, damage):
    folder, expected = filled
    for file in files(folder):
        file.chmod(0o600)
        file.write_bytes(damage(file.read_bytes()))
    assert finish(start(folder))[0] == expected
    assert finish(start(folder))[1].splitlines()[-1] == "0 False", "it was not repaired"


def test_a_cache_that_others_can_write_is_not_used(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    out, err = finish(start(folder))
    assert out.count("\n") == 2 and "CacheWarning" in err and not files(folder)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    assert finish(start(folder))[0].count("\n") == 2


def test_a_cache_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("no folder")
    out, err = finish(start(tmp_path / "file"))
    assert out.count("\n") == 2 and "CacheWarning" in err


def test_processes_fill_one_cache_together(tmp_path, filled):
    processes = [start(tmp_path / "cache") for _ in range(3)]
    assert {finish(p)[0] for p in processes} == {filled[1]}
    assert finish(start(tmp_path / "cache"))[1].splitlines()[-1] == "0 False"


# ---- threads and forks -----------------------------------------------------------------------------------------------


@pytest.mark.cpu
def test_threads_make_the_first_calls_together():
    """Different shapes at once, several times: everybody gets the results of their own."""
    compiled = jg.compile(scaled)
    wrong, barrier = [], threading.Barrier(4)

    def work(k):
        barrier.wait()
        for n in (k + 1, 3, k + 2, 3, 3):
            x = jg.full((n, 5), float(k))
            found = compiled(x, 0.5 + k)
            if not all(np.allclose(a.numpy(), b.numpy(), rtol=1e-5) for a, b in zip(found, scaled(x, 0.5 + k), strict=True)):
                wrong.append((k, n))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads) and not wrong


FORK = """
import os, sys, threading
import jitgrad as jg

@jg.compile
def step(x):
    return (x @ x).tanh().sum(0)

x = jg.ones(300, 300)
expected = step(x)
running = True
def work():
    while running:
        step(x)
threading.Thread(target=work, daemon=True).start()
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = all((step(x) == expected).all().item() for _ in range(3))
        new = step(jg.ones(7, 7))
        os._exit(0 if same and abs(new[0].item() - 7) < 1e-4 else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
running = False
assert (step(x) == expected).all().item()
print("fine")
"""


def test_a_fork_while_another_thread_computes(tmp_path):
    environment = {**os.environ, "JITGRAD_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, text=True, capture_output=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr
