"""A training's steps are cut and shared out so that what is learned depends on neither."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from srlm_lite.processes import Place
from srlm_lite.training.dealing import Deal


def test_whole_micro_batches_are_dealt_round() -> None:
    """A step of six examples on two processes: two passes, the last one half empty."""
    step = [4, 0, 3, 1, 5, 2]
    first, second = (list(Deal(2, 3, Place(rank, 2)).share(step)) for rank in (0, 1))
    assert [[drawn.example for drawn in part] for part in first] == [[4, 0], [5, 2]]
    assert [[drawn.example for drawn in part] for part in second] == [[3, 1], [4]]
    # Trainer divides by the two passes, DDP by the two processes: 4 makes up for both.
    assert {drawn.factor for part in first for drawn in part} == {4.0}
    assert [[drawn.factor for drawn in part] for part in second] == [[4.0, 4.0], [0.0]]
    assert {drawn.mates for part in (*first, *second) for drawn in part} == {tuple(step)}


def test_a_micro_batch_is_split_where_a_process_would_have_none() -> None:
    deals = [Deal(4, 1, Place(rank, 2)) for rank in (0, 1)]
    assert [deal.largest for deal in deals] == [2, 2]
    shares = [list(deal.share([3, 1, 0, 2])) for deal in deals]
    assert [[d.example for part in share for d in part] for share in shares] == [[3, 1], [0, 2]]


@given(
    n=st.integers(1, 40),
    micro=st.integers(1, 6),
    per_step=st.integers(1, 5),
    world=st.integers(1, 5),
)
def test_every_example_counts_once_and_as_much_as_any_other(
    n: int, micro: int, per_step: int, world: int
) -> None:
    size = micro * per_step
    steps = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    deals = [Deal(micro, per_step, Place(rank, world)) for rank in range(world)]
    made = Counter[int]()
    for step in steps:
        shares = [list(deal.share(step)) for deal in deals]
        passes = {len(share) for share in shares}
        assert passes == {deals[0].passes(len(step))}
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
        assert sorted(weights) == step
        assert all(abs(weight - 1 / len(step)) < 1e-9 for weight in weights.values())
    assert set(made.values()) == {deals[0].passes_of_epoch(n)}
