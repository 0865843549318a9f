"""The capability panel: tasks of lm-evaluation-harness on the model that is in the slot.

The harness gets the very module that samples and trains, with the stack in it, so what it measures
is the model of the run and no reloaded base. Prompts go in as the tasks write them, without a chat
template, as in the harness's own leaderboards.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot


def harness_model(slot: Slot, base: LoadedBase, *, window: int, batch_rows: int) -> Any:
    """The slot's model as the harness knows models. It follows the slot: load a stack there."""
    from lm_eval.models.huggingface import HFLM

    # It warns that arguments for loading are ignored for a model that is loaded.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(
        pretrained=slot.model,
        tokenizer=copy.deepcopy(base.tokenizer),  # it may give it a pad token
        max_length=window,
        batch_size=batch_rows,
    )


def task_manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """The harness's index of tasks: of a folder alone, where that has them all.

    Raises:
        UserError: A task is in neither.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UserError(
            f"no such task: {', '.join(unknown)}",
            where="evaluate.tasks",
            way_out="`lm-eval ls tasks` lists the harness's; evaluate.tasks_dir adds your own",
        )
    return manager


def run_tasks(
    slot: Slot,
    base: LoadedBase,
    stack: Sequence[Adapter],
    tasks: Sequence[str],
    *,
    folder: Path | None,
    limit: int | None,
    window: int,
    batch_rows: int,
) -> dict[str, Any]:
    """The harness's results for tasks, on a stack.

    Args:
        folder: Of more tasks: YAML files in the harness's format.
        limit: At most so many items a task.

    Returns:
        `tasks`: for each its main `metric` (the normalised accuracy where there is one, else the
        task's first), `value`, `se`, `items`, `higher_is_better` and all `metrics`; and the
        harness's `versions` of the tasks.

    Raises:
        UserError: A task is not known, or its data cannot be had here.
    """
    import lm_eval

    manager = task_manager(tasks, folder)
    slot.load(stack)
    try:
        found: Any = lm_eval.simple_evaluate(
            model=harness_model(slot, base, window=window, batch_rows=batch_rows),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OSError as error:  # what `datasets` raises for data that is not here is one, too
        raise UserError(
            f"the data of a task cannot be had ({' '.join(str(error).split())[:200]})",
            where=f"evaluate.tasks = {', '.join(tasks)}",
            way_out="Without a hub, name tasks of your own whose data are local files "
            "(evaluate.tasks_dir)",
        ) from error
    return {
        "tasks": {name: _figures(found, name) for name in tasks},
        "versions": {name: found["versions"].get(name) for name in tasks},
        "harness": lm_eval.__version__,
    }


def _figures(found: Any, name: str) -> dict[str, Any]:
    row = found["results"][name]
    metrics = {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if isinstance(value, float) and "_stderr" not in key
    }
    metric = "acc_norm" if "acc_norm" in metrics else next(iter(metrics))
    errors = {
        key.replace("_stderr", "").removesuffix(",none"): value
        for key, value in row.items()
        if "_stderr" in key and isinstance(value, float)
    }
    better = (found.get("higher_is_better") or {}).get(name) or {}
    items = (found.get("n-samples") or {}).get(name) or {}
    return {
        "metric": metric,
        "value": round(metrics[metric], 4),
        "se": round(errors[metric], 4) if metric in errors else None,
        "items": items.get("effective"),
        "higher_is_better": better.get(metric.partition(",")[0]) is not False,
        "metrics": {key: round(value, 4) for key, value in metrics.items()},
    }
