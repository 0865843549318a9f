"""Prompt lists: which texts become the prompts of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from srlm_lite.data.columns import (
    Columns,
    column_needed,
    digest,
    id_of,
    is_foreign,
    reused_id,
    text_of,
)
from srlm_lite.data.ledger import Ledger
from srlm_lite.data.sources import DataSource
from srlm_lite.data.text import normalised, prompt_problem
from srlm_lite.records import Prompt


def read_prompts(
    source: DataSource, columns: Columns, *, lang: str | None, ledger: Ledger
) -> list[Prompt]:
    """The prompt of each row, an empty one where the row has none.

    Args:
        columns: As `ranked.guess_columns` found them; prompt and prompt id are used.
        lang: Rows that have a column `lang` must agree with it; None takes every language.
        ledger: Is told of the rows in other languages.

    Raises:
        UserError: No column holds prompts; an id stands for two different prompts.
    """
    if columns.prompt is None:
        raise column_needed(source, "no column for the prompt", "--prompt-column")
    prompts: list[Prompt] = []
    texts: dict[str, str] = {}
    for number, row in enumerate(source.rows, start=1):
        if is_foreign(row, lang):
            ledger.seen += 1
            ledger.drop("other_language")
            continue
        text = text_of(row, columns.prompt)
        prompt_id = id_of(row, columns.prompt_id) or digest(text)
        if texts.setdefault(prompt_id, text) != text:
            raise reused_id(source, number, prompt_id)
        prompts.append(Prompt(prompt_id, text, source.label))
    return prompts


def select_prompts(
    prompts: Iterable[Prompt],
    *,
    exclude: Collection[str],
    min_chars: int,
    max_chars: int,
    ledger: Ledger,
) -> list[Prompt]:
    """The prompts a run can use, in their order; the ledger is told of each.

    Args:
        exclude: Normalised texts of EFT prompts, which would spoil the evaluation.
    """
    selected: dict[str, Prompt] = {}
    for prompt in prompts:
        ledger.seen += 1
        text = normalised(prompt.text)
        problem = prompt_problem(prompt.text, min_chars=min_chars, max_chars=max_chars)
        if problem is None and text in exclude:
            problem = "in_eft"
        if problem is None and text in selected:
            problem = "duplicate"
        if problem is None:
            selected[text] = prompt
            ledger.kept += 1
        else:
            ledger.drop(problem)
    return list(selected.values())
