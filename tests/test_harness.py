"""The capability panel sees the stack in the slot, not a bare base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase, load_base
from srlm_lite.model.harness import harness_model, run_tasks, task_manager
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.settings import Base, Lora
from srlm_lite.shipped import recipes_dir
from srlm_lite.training.likelihood import log_likelihoods
from srlm_lite.training.sft import Example

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

TARGETS = Lora().targets
TASK = """task: whales
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def toy() -> tuple[LoadedBase, Slot]:
    base = load_base(Base(name=str(recipes_dir() / "toy/base"), dtype="float32"))
    return base, Slot(base.model, targets=TARGETS, rank=12)


def adapters(slot: Slot) -> list[Adapter]:
    """An anchor of rank 8 and a delta of rank 4, both of which change something."""
    import torch

    stack = []
    for seed, rank in enumerate((8, 4)):
        fresh = slot.fresh(Lora(rank=rank, alpha=2.0 * rank, targets=TARGETS), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        factors = {
            name: (a, 0.05 * torch.randn(b.shape, generator=generator))
            for name, (a, b) in fresh.factors.items()
        }
        stack.append(Adapter(rank=rank, alpha=2.0 * rank, factors=factors))
    return stack


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    rows = [
        {"question": "give me facts about the whale", "choices": ["facts", "moon"], "answer": i % 2}
        for i in range(6)
    ]
    data = tmp_path / "whales.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "whales.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return tmp_path


def test_its_loglikelihoods_are_those_of_the_stack(toy: tuple[LoadedBase, Slot]) -> None:
    base, slot = toy
    ids = base.tokenizer("give me facts about the whale", add_special_tokens=False).input_ids
    # Of several lengths; the harness keeps apart only sequences that differ before their last id.
    examples = [
        Example(tuple(ids[:2]), tuple(ids[2:])),
        Example(tuple(ids[:3]), tuple(ids[3:5])),
        Example(tuple(ids[1:4]), tuple(ids[4:])),
    ]
    requests: list[Any] = [
        (("", ""), list(one.prompt_ids), list(one.target_ids)) for one in examples
    ]
    harness = harness_model(slot, base, window=256, batch_rows=2)
    anchor, delta = adapters(slot)
    seen = []
    for stack in ([], [anchor], [anchor, delta]):
        ours = log_likelihoods(slot, base, stack, examples, batch_rows=2)
        slot.load(stack)
        theirs = [value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
        assert theirs == pytest.approx(ours, abs=1e-4)
        seen.append(theirs)
    # Base, anchor, and anchor with delta are three models.
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert max(abs(a - b) for a, b in zip(seen[one], seen[other], strict=True)) > 0.05


def test_a_task_of_ones_own_on_local_files(toy: tuple[LoadedBase, Slot], tasks_dir: Path) -> None:
    base, slot = toy
    stack = adapters(slot)
    found = run_tasks(
        slot, base, stack, ["whales"], folder=tasks_dir, limit=4, window=256, batch_rows=4
    )
    # The same answer to the same question: right for one of the two keys, half of four.
    assert found["tasks"]["whales"]["value"] == 0.5
    assert found["tasks"]["whales"]["metric"] == "acc"
    assert found["tasks"]["whales"]["items"] == 4
    assert found["tasks"]["whales"]["higher_is_better"] is True
    assert found["tasks"]["whales"]["se"] == pytest.approx(0.2887, abs=1e-3)  # sqrt(.25 / 3)


def test_an_unknown_task_is_refused(tasks_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The index of the harness's own tasks takes seconds to build; that of the folder does here.
    real = lm_eval_tasks.TaskManager
    monkeypatch.setattr(
        lm_eval_tasks,
        "TaskManager",
        lambda include_path, **_: real(include_path=include_path, include_defaults=False),
    )
    with pytest.raises(UserError, match="no such task: try, whale"):
        task_manager(["whale", "try"], tasks_dir)


def test_data_that_is_not_here_is_told(toy: tuple[LoadedBase, Slot], tmp_path: Path) -> None:
    base, slot = toy
    text = TASK.format(data=tmp_path / "nowhere.jsonl")
    (tmp_path / "whales.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="the data of a task cannot be had"):
        run_tasks(slot, base, [], ["whales"], folder=tmp_path, limit=2, window=256, batch_rows=4)
