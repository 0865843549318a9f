"""A training's steps are cut and shared out so that what is learned depends on neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from srlm_lite.processes import Place
from srlm_lite.training.dealing import StepOrder, cut, deal

LENGTHS = (4, 1, 7, 2, 9, 3)


def size(examples: Sequence[int]) -> int:
    return sum(LENGTHS[one % len(LENGTHS)] for one in examples)


def test_a_part_holds_what_its_budget_allows_and_one_example_whatever_it_takes() -> None:
    # 4 + 1 fit into 6, 7 alone does not, 2 would fit but for 9 beside it, 3 is left.
    assert cut([0, 1, 2, 3, 4, 5], size, budget=6) == [[0, 1], [2], [3], [4], [5]]
    assert cut([0, 1, 2, 3, 4, 5], size, budget=100) == [[0, 1, 2, 3, 4, 5]]
    assert cut([0, 1, 2, 3, 4, 5], size, budget=100, least=2) == [[0, 1, 2], [3, 4, 5]]


def test_parts_are_dealt_round_and_nobody_is_without() -> None:
    parts = [[4, 0], [3, 1], [5]]
    first, second = (deal(parts, Place(rank, 2)) for rank in (0, 1))
    assert [(share.examples, share.counts) for share in first] == [([4, 0], True), ([5], True)]
    assert [(share.examples, share.counts) for share in second] == [([3, 1], True), ([4], False)]


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 12),
    budget=st.integers(1, 30),
    world=st.integers(1, 5),
)
def test_every_example_counts_once_an_epoch(n: int, batch: int, budget: int, world: int) -> None:
    steps = StepOrder(n, batch, seed=3)
    assert len(steps) == -(-n // batch)
    made = Counter[int]()
    for step in steps:
        parts = cut(step, size, budget=budget, least=world)
        assert [one for part in parts for one in part] == step
        assert len(parts) >= min(world, len(step))
        assert all(size(part) <= budget or len(part) == 1 for part in parts)
        dealt = [deal(parts, Place(rank, world)) for rank in range(world)]
        assert {len(shares) for shares in dealt} == {-(-len(parts) // world)}
        made.update(one for own in dealt for share in own if share.counts for one in share.examples)
    assert made == Counter(range(n))
    assert [*steps] != [*StepOrder(n, batch, seed=3)] or n < 4  # the next epoch has another order


def test_a_pass_has_its_order_though_nobody_comes_to_the_end_of_the_one_before() -> None:
    """transformers' trainer takes as many steps as there are, and asks for no more."""
    order = StepOrder(8, 2, seed=1)
    loader: DataLoader[int] = DataLoader(range(8), batch_sampler=order, collate_fn=tuple)  # type: ignore[arg-type]
    first, second = (list(islice(iter(loader), len(order))) for _ in range(2))
    assert first != second
    assert second == [tuple(step) for step in StepOrder(8, 2, seed=1, epoch=1)]
