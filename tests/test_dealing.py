"""Several processes share a training's steps so that together they learn what one alone would."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from srlm_lite.processes import Place
from srlm_lite.training.dealing import Deal


def test_whole_micro_batches_are_dealt_round() -> None:
    """Steps of three pairs of examples on two processes: two passes, the last one half empty."""
    step = [[4, 0], [3, 1], [5, 2]]
    first, second = (list(Deal(2, 3, Place(rank, 2)).share(step)) for rank in (0, 1))
    assert [[drawn.example for drawn in part] for part in first] == [[4, 0], [5, 2]]
    assert [[drawn.example for drawn in part] for part in second] == [[3, 1], [4]]
    # A mean over a micro-batch is a third of the step's mean. Trainer divides by the two passes,
    # DDP by the two processes: 4 / 3 makes up for both.
    assert {drawn.factor for part in first for drawn in part} == {4 / 3}
    assert [[drawn.factor for drawn in part] for part in second] == [[4 / 3, 4 / 3], [0.0]]


def test_a_micro_batch_is_split_where_a_process_would_have_none() -> None:
    deals = [Deal(4, 1, Place(rank, 2)) for rank in (0, 1)]
    assert [deal.largest for deal in deals] == [2, 2]
    shares = [list(deal.share([[3, 1, 0, 2]])) for deal in deals]
    assert [[d.example for part in share for d in part] for share in shares] == [[3, 1], [0, 2]]
    assert {d.mates for share in shares for part in share for d in part} == {(3, 1, 0, 2)}


@given(
    n=st.integers(1, 40),
    micro=st.integers(1, 6),
    per_step=st.integers(1, 5),
    world=st.integers(1, 5),
)
def test_every_example_counts_once_and_as_much_as_alone(
    n: int, micro: int, per_step: int, world: int
) -> None:
    batches = [list(range(start, min(start + micro, n))) for start in range(0, n, micro)]
    steps = [batches[start : start + per_step] for start in range(0, len(batches), per_step)]
    deals = [Deal(micro, per_step, Place(rank, world)) for rank in range(world)]
    made = Counter[int]()
    for step in steps:
        shares = [list(deal.share(step)) for deal in deals]
        passes = {len(share) for share in shares}
        assert passes == {deals[0].passes(sum(map(len, step)))}
        weights: dict[int, float] = {}
        for rank, share in enumerate(shares):
            made[rank] += len(share)
            for part in share:
                assert 0 < len(part) <= deals[rank].largest <= micro
                for drawn in part:
                    if drawn.factor:
                        assert drawn.example not in weights
                        scale = len(share) * world  # what Trainer and DDP divide by
                        weights[drawn.example] = drawn.factor / len(drawn.mates) / scale
        # Alone: the mean of the micro-batches' means.
        alone = {example: 1 / len(batch) / len(step) for batch in step for example in batch}
        assert weights.keys() == alone.keys()
        assert all(abs(weights[i] - alone[i]) < 1e-9 for i in alone)
    assert set(made.values()) == {deals[0].passes_of_epoch(n)}
