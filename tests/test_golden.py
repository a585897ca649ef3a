"""Golden programs: what canonical functions look like as traced and after fusion, and how many kernels they become.

``pytest tests/test_golden.py --update-golden`` writes the files anew; read the difference before it is committed."""

from pathlib import Path

import numpy as np
import pytest
from golden_programs import PROGRAMS
from programs import plans_made_by

import jitgrad as jg
from jitgrad import config, pipeline
from jitgrad.ir.parse import parse_graph
from jitgrad.ir.printer import print_graph

FOLDER = Path(__file__).parent / "golden"
STAGES = ("trace", "fuse")

KERNELS = {
    "softmax": "row",
    "log_softmax_nll": "row full row",
    "layer_norm": "row column",
    "batch_norm": "row",
    "gelu": "map",
    "adam_update": "foreach foreach foreach",
    "attention": "attention",
    "conv_relu_pool": "convolution max_pool",
    "mlp_step": "matmul matmul row full row column matmul matmul matmul foreach",
    "mixed_precision_step": "map matmul full column matmul full full concat full map foreach map foreach foreach",
}
"""What each program becomes at the sizes that stand in it, a step each: the templates of its regions, and ops with
kernels of their own. (How many kernels carry out a step, one, or two phases, is the business of code generation, and of
the machine.)"""


class NoPlan:
    """Computes nothing: of these programs only the graph is wanted."""

    def __init__(self, graph):
        self.graph = graph

    def run(self, inputs):
        return [np.zeros(v.shape, v.dtype.numpy) for v in self.graph.outputs]


@pytest.fixture(scope="module")
def builds():
    """Program name -> all that lies between its graph and its plan."""
    return {program.__name__: build(program) for program in PROGRAMS}


def build(program):
    graphs = []

    def remember(graph):
        graphs.append(graph)
        return NoPlan(graph)

    step, arguments = program()
    with plans_made_by(remember):
        jg.compile(step)(*arguments)
    (graph,) = graphs
    with config.scope(check=True):
        return pipeline.build(graph)


def kernels(built):
    nodes = [step.step.node for step in built.linked.steps]
    return " ".join([node.attrs.get("template", node.op.name) for node in nodes])


def stage(built, name):
    return next(s.graph for s in built.stages if s.name == name)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("program", [p.__name__ for p in PROGRAMS])
def test_program_is_as_it_was(program, name, builds, request):
    text = print_graph(stage(builds[program], name), f"{program} after {name}") + "\n"
    file = FOLDER / f"{program}.{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text)
    assert file.read_text() == text, "the program changed; if it is meant to: pytest tests/test_golden.py --update-golden"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("program", [p.__name__ for p in PROGRAMS])
def test_text_is_the_program(program, name, builds):
    """What is printed can be read back, and is then the same graph and the same text."""
    graph = stage(builds[program], name)
    again = parse_graph(print_graph(graph))
    assert again == graph
    assert print_graph(again) == print_graph(graph)


@pytest.mark.parametrize("program", [p.__name__ for p in PROGRAMS])
def test_kernel_count(program, builds):
    assert kernels(builds[program]) == KERNELS[program]
