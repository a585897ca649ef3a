"""What a program is: types, values, nodes, graphs; printing, parsing, checking and replaying them.

Nothing in here knows a particular op."""

from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, rebuild
from jitgrad.ir.interpreter import interpret, set_default
from jitgrad.ir.op import REGISTRY, Op, register
from jitgrad.ir.replay import evaluate, replay
from jitgrad.ir.types import TensorType, parse_type
from jitgrad.ir.verify import verify

__all__ = ["REGISTRY", "Graph", "GraphBuilder", "Node", "Op", "TensorType", "Value", "evaluate", "interpret",
           "parse_type", "rebuild", "register", "replay", "set_default", "verify"]
