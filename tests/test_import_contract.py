"""Imports point one way, heavy libraries load late, and the passes need neither Numba nor llvmlite."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jitgrad.kernels

PACKAGE = Path(jitgrad.__file__).parent
KERNELS = Path(next(iter(jitgrad.kernels.__path__)))

LEAF = {"errors", "config", "devices", "dtypes", "shapes", "tree", "changes", "objectfile", "precision", "products",
        "processors", "garbage"}
BELOW = {
    "leaf": set(),
    "ir": {"leaf"},
    "ops": {"leaf", "ir"},
    "kernels": {"leaf"},
    "transforms": {"leaf", "ir", "ops"},
    "codegen": {"leaf", "ir", "ops", "kernels"},
    "runtime": {"leaf", "ir", "ops", "kernels"},
    "pipeline": {"leaf", "ir", "ops", "kernels", "transforms", "codegen", "runtime"},
    "functional": {"leaf", "ir", "ops"},
}
"""What each layer may import, itself apart. Layers above are free but for `TOP`."""

PIPELINE = ("pipeline", "linking", "gpu_linking", "plain", "plans", "gpu_plans", "tuning", "gpu_tuning")

TOP = {"nn", "optim", "amp", "data", "compile"}
"""What only these, and what users import, may import."""

OPTIONAL = {"numba", "llvmlite", "pygments", "IPython", "rich", "torch", "tqdm", "cuda", "jitgrad"}


def layer_of(module: str) -> str:
    name = module.removeprefix("jitgrad").removeprefix(".").split(".")[0]
    if name in LEAF:
        return "leaf"
    return "pipeline" if name in PIPELINE else name or "package"


def modules() -> dict[str, Path]:
    found = {}
    for root, prefix in ((PACKAGE, "jitgrad"), (KERNELS, "jitgrad.kernels")):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join([prefix, *[p for p in parts if p != "__init__"]])] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> list[str]:
    """The modules that a piece of code imports, but for what stands under TYPE_CHECKING."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in deeper]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += [name for part in node.orelse for name in imports(part)]
        else:
            found += imports(node)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    layer = layer_of(module)
    if layer not in BELOW:
        return
    for name in imports(ast.parse(MODULES[module].read_text())):
        if name.split(".")[0] == "jitgrad" and name != "jitgrad":
            assert layer_of(name) in BELOW[layer] | {layer}, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_functions_are_of_optional_libraries(module):
    tree = ast.parse(MODULES[module].read_text())
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name in imports(function):
                top = name.split(".")[0]
                assert top in OPTIONAL, f"{module}: {function.name} imports {name}"
                if top == "jitgrad":
                    assert is_allowed_inside(module, function.name, name), f"{module}: {function.name} imports {name}"


def is_allowed_inside(module: str, function: str, name: str) -> bool:
    """The methods of the representation that print it, and what loads the compiler."""
    return module.startswith("jitgrad.ir.") or name == "jitgrad.codegen.native"


def run(text: str) -> str:
    """What a fresh process prints, in a folder that holds no code."""
    arguments = [sys.executable, "-I", "-c", text]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def test_importing_loads_no_compiler():
    assert run("import jitgrad, sys; print([m for m in ('numba', 'llvmlite') if m in sys.modules])") == "[]"


def test_passes_run_without_numba():
    assert run("""
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
from jitgrad import ops
from jitgrad.ir import GraphBuilder, parse_type
from jitgrad.transforms import autodiff, fuse, simplify
builder = GraphBuilder()
x = builder.input(parse_type("f32[4, 4]"))
with builder:
    graph = builder.build([ops.sum(ops.exp(x), axes=(1,))])
print(len(fuse.fuse(simplify.simplify(graph)).nodes))
""") == "1"


def test_the_kernels_folder_is_no_top_level_package():
    assert "jitgrad" in str(run("import jitgrad.kernels; print(jitgrad.kernels.__name__)"))
    assert run("import importlib.util; print(importlib.util.find_spec('kernels'))") == "None"


def test_no_file_is_too_long():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 1000}
    assert not long, f"files of more than 1000 lines: {long}"


def test_every_package_is_installed():
    """pyproject.toml lists them, because the folder of the kernels stands elsewhere than its name says."""
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, path in MODULES.items() if path.name == "__init__.py")
