"""One token more for every row of a tree: step after step, on a GPU replayed from a CUDA graph.

A step launches some thousands of small kernels, and a GPU computes them faster than Python can
launch them. Captured once, as one graph, they are launched as one. A graph is the same operations
on the same memory, so it holds while the rows are the same, and while what they attend to is: a
tree that is held (`Tree.hold`) attends to a fixed number of places, written or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srlm_lite.model.renamed import with_cache
from srlm_lite.rollout.tree import Tree

logger = logging.getLogger(__name__)

SAME = 0.05
"""Nats between two ways to compute one token's distribution that rounding explains."""

HELD = 64
"""Steps that one graph is good for at most. More would attend to more places in vain, fewer would
capture more often; a capture launches every kernel once, as a step without a graph does."""
SPARE = 2 << 30
"""Bytes free on the device under which cached ones are freed before a capture, which cannot."""


class Steps:
    """The logits of each row's next token.

    The first step after a change of the rows is computed as it is, which also loads its kernels;
    the second is captured, and replayed from then on. The first graph has to give what the model
    gives without it. Where it does not, or where a capture fails, a warning says so and every step
    is computed as it is.

    Args:
        model: The base with its slot; its attention is the tree's for as long as this is in use.
        capture: Whether to capture steps at all.
    """

    def __init__(self, model: Any, tree: Tree, *, capture: bool) -> None:
        self._model, self._tree = model, tree
        self.captures = capture
        """Whether steps are captured; false from the first failure on."""
        self._left = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        """The one for the steps that follow now."""
        self._before: torch.cuda.CUDAGraph | None = None
        """The newest, kept for its memory."""
        self._ids = self._logits = torch.empty(0)

    def next_logits(self, ids: Tensor) -> Tensor:
        """(B, V) for each row's next token; valid until the next call.

        Args:
            ids: (B, 1) each row's last token.
        """
        if not self.captures:
            return self._computed(ids)
        if not self._tree.is_held or not self._left:
            self._left, self._graph = self._tree.hold(HELD), None
            self._ids = self._logits = torch.empty(0)
            logits = self._computed(ids)
        else:
            self._graph = self._graph or self._capture(ids)
            logits = self._replayed(self._graph, ids) if self._graph else self._computed(ids)
        self._left -= 1
        return logits

    def _computed(self, ids: Tensor) -> Tensor:
        positions = self._tree.positions
        with self._tree.growing_leaves():
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                **with_cache(self._model, self._tree),
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _replayed(self, graph: torch.cuda.CUDAGraph, ids: Tensor) -> Tensor:
        self._ids.copy_(ids)
        graph.replay()
        return self._logits

    def _capture(self, ids: Tensor) -> torch.cuda.CUDAGraph | None:
        """The next step as a graph, if it can be one. The tree is where it was."""
        self._ids = ids.clone()
        try:
            graph, self._logits = captured(lambda: self._computed(self._ids), after=self._before)
        except RuntimeError as error:
            self._give_up(str(error.__context__ or error).partition("\n")[0])
            return None
        is_first, self._before = self._before is None, graph
        if is_first:
            expected = self._computed(ids)
            self._tree.step_back()
            apart = float(divergence(expected, self._replayed(graph, ids)))
            self._tree.step_back()
            if not apart < SAME:
                self._give_up(f"its distribution is {apart:.2g} nats from the model's")
                return None
        return graph

    def _give_up(self, reason: str) -> None:
        logger.warning(
            "a step of this model does not go into a CUDA graph (%s); sampling without, slower",
            reason,
        )
        self.captures, self._graph, self._before = False, None, None
        self._tree.release()


def captured(
    work: Callable[[], Tensor], *, after: torch.cuda.CUDAGraph | None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of some work, and where its replays leave their result. Nothing is computed.

    Args:
        after: The graph before, whose memory this one takes over.

    Raises:
        RuntimeError: The work waits for the device, or there is no memory for it.
    """
    if torch.cuda.mem_get_info()[0] < SPARE:
        torch.cuda.empty_cache()
    pool = None if after is None else after.pool()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Threads of others, such as a progress bar's, may go on meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            graph.capture_end()
            # cuBLAS would keep its workspace for this stream, in the graph's memory, for good.
            torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler, in nats, of two times (B, V) logits: of the row that differs most."""
    true, other = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    return (true.exp() * (true - other)).sum(-1).max()
