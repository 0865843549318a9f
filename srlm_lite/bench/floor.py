"""The least time that sampling can take on a machine: the roofline, by arithmetic.

A phase moves numbers and multiplies them. Neither can be avoided, and at best both happen at once,
so a phase takes at least

    max(FLOPs / matmul rate, bytes / memory bandwidth)

and the floor is the sum over the phases: prefill and decoding of the candidates, then of the
judgements. Counted is what any way has to do that gives these samples, all rows at once:

- Prefill: every prompt's tokens once, whatever the number of its samples, and a prefix that all
  prompts share once for all of them. A token costs 2 FLOPs for each weight of the decoder's linear
  layers, and 4·L·W_q for each token it attends to (L layers, W_q query heads times their width:
  one product with the keys, one with the values). The vocabulary's scores are needed at the last
  token of each prompt. Bytes: the weights once, the keys and values written.
- Decoding: T tokens a sample are T - 1 steps, for the first comes from the prefill. In each step a
  sample costs the same FLOPs as a token above, and 2·V·H for its vocabulary's scores. Bytes: the
  weights once a step, and all keys and values there are, each once: those of a prompt once for all
  its samples.
- In a layer with a window a token attends to no more tokens than the window has, and only those are
  read that some window still reaches.

Drawing from the vocabulary, the norms, the softmax and all traffic of activations count for
nothing; so the floor cannot be reached, and a share of one half is a good engine.

Source: Williams et al. 2009, "Roofline", Communications of the ACM 52(4), for the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from srlm_lite.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What of a decoder-only model counts."""

    linear: int
    """Weights of all linear layers but the last, which scores the vocabulary."""
    head: int
    """Weights of that one, V·H."""
    layers: int
    query_width: int
    """Query heads times the width of a head."""
    cache_width: int
    """Key-value heads times the width of a head."""
    number_bytes: int
    """Bytes of one weight, and of one number in the cache."""
    linear_bytes: float | None = None
    """Bytes of one weight of those linear layers, where they are quantized."""
    windowed: int = 0
    """Layers, of all of them, that attend to a window."""
    window: int | None = None
    """Tokens that it has."""

    def over_layers(self, count: Callable[[int | None], int]) -> int:
        """The sum over the layers of what is counted for one, by its window."""
        rest = self.layers - self.windowed
        return rest * count(None) + (self.windowed * count(self.window) if self.windowed else 0)

    @property
    def weights(self) -> float:
        """Bytes of all weights that count."""
        each = self.number_bytes if self.linear_bytes is None else self.linear_bytes
        return each * self.linear + self.number_bytes * self.head


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """FLOPs and bytes of one phase."""

    flops: float
    bytes: float

    def seconds(self, *, flops_rate: float, bandwidth: float) -> float:
        """The least time, at a rate in FLOP/s and a bandwidth in bytes/s."""
        return max(self.flops / flops_rate, self.bytes / bandwidth)


def prefill(shape: Dimensions, lengths: Sequence[int], *, shared: int = 0) -> PhaseWork:
    """Compute every prompt once.

    Args:
        lengths: Tokens of each prompt.
        shared: Tokens at their start that are the same in all of them.
    """
    tokens = shared + sum(length - shared for length in lengths)

    def attended(window: int | None) -> int:
        common = triangle(shared, window)
        return common + sum(triangle(n, window) - common for n in lengths)

    cached = shape.over_layers(lambda window: _kept(lengths, shared, window, step=1))
    return PhaseWork(
        flops=2 * shape.linear * tokens
        + 4 * shape.query_width * shape.over_layers(attended)
        + 2 * shape.head * len(lengths),
        bytes=shape.weights + shape.number_bytes * 2 * shape.cache_width * cached,
    )


def decode(
    shape: Dimensions, lengths: Sequence[int], *, samples: int, new_tokens: int, shared: int = 0
) -> PhaseWork:
    """Continue every prompt `samples` times by `new_tokens` tokens."""
    rows = len(lengths) * samples
    steps = range(1, new_tokens)

    # In step s a row attends to its prompt and to the s tokens it has drawn, the newest included.
    def attended(window: int | None) -> int:
        return sum(samples * _within(n + step, window) for step in steps for n in lengths)

    def cached(window: int | None) -> int:
        return sum(
            _kept(lengths, shared, window, step=step) + rows * _within(step, window)
            for step in steps
        )

    return PhaseWork(
        flops=len(steps) * rows * 2 * (shape.linear + shape.head)
        + 4 * shape.query_width * shape.over_layers(attended),
        bytes=len(steps) * shape.weights
        + shape.number_bytes * 2 * shape.cache_width * shape.over_layers(cached),
    )


def dpo_step(
    shape: Dimensions, sequences: Sequence[tuple[int, int]], *, batches: int, checkpointing: bool
) -> PhaseWork:
    """One optimiser step of DPO on frozen weights.

    A sequence runs forward in the policy and in the reference, and backward in the policy, which
    for frozen weights costs the linear layers a forward pass again (the gradient of their input
    alone) and attention two; checkpointing computes the layers forward once more. The adapters
    themselves count for nothing.

    Args:
        sequences: Tokens of each, chosen and rejected ones both, and how many of them are scored.
        batches: Forward passes that they are spread over.
    """
    again = 1 if checkpointing else 0
    layers, scores = 0, 0
    for tokens, scored in sequences:
        linear = 2 * shape.linear * tokens
        seen = shape.over_layers(partial(triangle, tokens))
        attended = 4 * shape.query_width * seen
        layers += (3 + again) * linear + (4 + again) * attended
        scores += 3 * 2 * shape.head * scored
    return PhaseWork(flops=layers + scores, bytes=batches * (3 + again) * shape.weights)


def _within(tokens: int, window: int | None) -> int:
    return tokens if window is None else min(tokens, window)


def triangle(n: int, window: int | None = None) -> int:
    """Tokens attended to by n tokens in a row: 1 + 2 + ... + n, none more than the window."""
    ramp = _within(n, window)
    return ramp * (ramp + 1) // 2 + (n - ramp) * ramp


def _kept(lengths: Sequence[int], shared: int, window: int | None, *, step: int) -> int:
    """Tokens of the prompts that some sample's token attends to, the `step`-th of each sample."""
    back = max(lengths, default=0) if window is None else max(0, window - step)
    own = sum(min(n - shared, back) for n in lengths)
    return own + max((min(shared, max(0, back - (n - shared))) for n in lengths), default=0)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens at the start that are the same in all prompts; 0 for a single one."""
    if len(prompts) < 2:
        return 0
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def phases(
    shape: Dimensions,
    workload: Workload,
    questions: Sequence[Sequence[int]],
    grading: Sequence[Sequence[int]],
) -> dict[str, PhaseWork]:
    """The four phases of the workload, by name, for its prompts and judge prompts as ids."""
    work = {}
    for name, prompts, samples, new_tokens in (
        ("candidates", questions, workload.n, workload.answer_tokens),
        ("judge", grading, workload.votes, workload.vote_tokens),
    ):
        lengths, shared = [len(prompt) for prompt in prompts], shared_prefix(prompts)
        work[f"{name}_prefill"] = prefill(shape, lengths, shared=shared)
        work[f"{name}_decode"] = decode(
            shape, lengths, samples=samples, new_tokens=new_tokens, shared=shared
        )
    return work
