"""Minimum cut of a directed network (Dinic's algorithm), without recursion.

In: edges with integer capacities. Out: the vertices on the source's side of a smallest cut. Time is linear in the edges
for every phase; the number of phases is at most the number of different lengths of shortest paths, so networks made of
short paths take linear time.
"""

from __future__ import annotations

from collections import deque

INFINITE = 1 << 62


class Network:
    """Vertices are numbers from `vertex`; 0 is the source and 1 the sink."""

    SOURCE, SINK = 0, 1

    def __init__(self) -> None:
        self.edges_from: list[list[int]] = [[], []]
        self.head: list[int] = []                    # edge k and its reverse k ^ 1
        self.residual: list[int] = []

    def vertex(self) -> int:
        self.edges_from.append([])
        return len(self.edges_from) - 1

    def connect(self, tail: int, head: int, capacity: int = INFINITE) -> None:
        self.edges_from[tail].append(len(self.head))
        self.edges_from[head].append(len(self.head) + 1)
        self.head += [head, tail]
        self.residual += [capacity, 0]

    def source_side(self) -> set[int]:
        """Vertices that the source still reaches when the flow is largest: the source's side of a minimum cut."""
        while (levels := self._levels())[self.SINK] >= 0:
            self._block(levels)
        return {v for v, level in enumerate(levels) if level >= 0}

    def _levels(self) -> list[int]:
        """Breadth-first distance from the source over edges with capacity left; -1 where there is no way."""
        levels = [-1] * len(self.edges_from)
        levels[self.SOURCE] = 0
        queue = deque([self.SOURCE])
        while queue:
            v = queue.popleft()
            for edge in self.edges_from[v]:
                w = self.head[edge]
                if self.residual[edge] and levels[w] < 0:
                    levels[w] = levels[v] + 1
                    queue.append(w)
        return levels

    def _block(self, levels: list[int]) -> None:
        """Push flow along shortest paths until none is left: a depth-first walk that never tries an edge twice."""
        untried = [list(edges) for edges in self.edges_from]
        path: list[int] = []
        v = self.SOURCE
        while True:
            if v == self.SINK:
                v = self._push(path)
            elif untried[v]:
                edge = untried[v][-1]
                w = self.head[edge]
                if self.residual[edge] and levels[w] == levels[v] + 1:
                    path.append(edge)
                    v = w
                else:
                    untried[v].pop()
            elif path:
                v = self.head[path.pop() ^ 1]
                untried[v].pop()
            else:
                return

    def _push(self, path: list[int]) -> int:
        """Fill the path; shorten it to the first edge that is full now, and return that edge's tail."""
        amount = min([self.residual[edge] for edge in path])
        first_full = -1
        for k, edge in enumerate(path):
            self.residual[edge] -= amount
            self.residual[edge ^ 1] += amount
            if first_full < 0 and not self.residual[edge]:
                first_full = k
        tail = self.head[path[first_full] ^ 1]
        del path[first_full:]
        return tail
