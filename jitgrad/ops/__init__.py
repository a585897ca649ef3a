"""Every primitive: what it means, as one record each (`jitgrad.ir.Op`), one file per family.

``ops.NAME(*operands, **attributes)`` carries one out by the current interpreter. Primitives are strict: they never
broadcast, never promote and have no defaults; axes count from the front. Beside them stand the builders that gradient
rules and derived operations are written with, and the functions that apply the rules.
"""

# ruff: noqa: F403
from jitgrad.ops.attention import *
from jitgrad.ops.barrier import *
from jitgrad.ops.builders import *
from jitgrad.ops.check import *
from jitgrad.ops.contraction import *
from jitgrad.ops.derived import *
from jitgrad.ops.elementwise import *
from jitgrad.ops.foreach import *
from jitgrad.ops.gradient import *
from jitgrad.ops.index import *
from jitgrad.ops.movement import *
from jitgrad.ops.record import *
from jitgrad.ops.recurrence import *
from jitgrad.ops.reduction import *
from jitgrad.ops.region import *
from jitgrad.ops.scan import *
from jitgrad.ops.sort import *
from jitgrad.ops.source import *
from jitgrad.ops.window import *
