"""`srlm-lite data prepare`: one source becomes the seed data of a run.

The directory it writes holds

- `ift.jsonl`: prompts with their best reply;
- `eft_train.jsonl`, `eft_eval.jsonl`: other prompts with all their replies, in people's order;
- `prompts.jsonl`: prompts for the policy. From `--prompts` where given; otherwise the prompts of
  the source that went into neither part, then those of IFT. Never an EFT prompt;
- `prepare.json`: what was asked for, and how many rows were kept and dropped, and why.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from srlm_lite.data.columns import Columns, guess_columns
from srlm_lite.data.ledger import REASONS, Ledger
from srlm_lite.data.oasst import is_flat, is_nested, read_trees
from srlm_lite.data.prompts import read_prompts, select_prompts
from srlm_lite.data.ranked import (
    is_pairs,
    is_ranked,
    read_pairs,
    read_replies,
    score_range,
    score_target,
)
from srlm_lite.data.sources import DataSource, read_source
from srlm_lite.data.split import RankedPrompt, SplitData, hash_order, split
from srlm_lite.data.text import normalised
from srlm_lite.errors import UserError
from srlm_lite.records import Prompt, RankedReply, Record
from srlm_lite.run.files import write_json, write_records

Format = Literal["oasst-trees", "ranked", "prompts"]
FILES = ("ift.jsonl", "eft_train.jsonl", "eft_eval.jsonl", "prompts.jsonl")
REPORT = "prepare.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What to make of a source."""

    format: Format | Literal["auto"] = "auto"
    prompts: str | None = None
    """A prompt list (file or Hub id) for `prompts.jsonl`."""
    hub_split: str = "train"
    lang: str | None = "en"
    """None takes every language."""
    ift_share: float = 0.5
    """Share of the prompts whose replies are ordered; the others are EFT."""
    eval_share: float = 0.25
    """Share of the EFT prompts that is held out."""
    columns: Columns = field(default_factory=Columns)
    given_scores: bool = False
    """Write each EFT target as its known score, without a rationale."""
    score_range: tuple[float, float] | None = None
    """Default: the lowest and highest score in the source."""
    target_range: tuple[int, int] = (0, 5)
    min_prompt_chars: int = 10
    max_prompt_chars: int = 2000


@dataclass(slots=True)
class Prepared:
    """Rows for the files, and the account of them."""

    source: DataSource
    format: Format
    seed: SplitData = field(default_factory=SplitData)
    prompts: list[Prompt] = field(default_factory=list)
    reply_ledger: Ledger = field(default_factory=Ledger)
    prompt_ledger: Ledger = field(default_factory=Ledger)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, Sequence[Record]]:
        """What each file holds; a prompt list makes `prompts.jsonl` alone."""
        if self.format == "prompts":
            return {"prompts.jsonl": self.prompts}
        seed = self.seed
        return dict(
            zip(FILES, (seed.ift, seed.eft_train, seed.eft_eval, self.prompts), strict=True)
        )

    def summary(self) -> dict[str, Any]:
        """As JSON: rows and prompts of each file, and both ledgers."""
        files = {
            name: {
                "rows": len(rows),
                "prompts": len({row.to_row()["prompt_id"] for row in rows}),
            }
            for name, rows in self.rows().items()
        }
        return {
            "source": self.source.where,
            "format": self.format,
            "files": files,
            "replies": self.reply_ledger.summary(),
            "prompts": self.prompt_ledger.summary(),
            "notes": self.notes,
        }


def prepare(source: str, out: Path, options: Options, *, force: bool = False) -> dict[str, Any]:
    """Read a source, write the data directory, return what `prepare.json` holds.

    Raises:
        UserError: Whatever is wrong with the source or the options; `out` holds data already and
            `force` is not set; or no row was kept.
    """
    _check_out(out, force=force)
    prepared = read(source, options)
    facts = {**prepared.summary(), "options": asdict(options)}
    _write(out, prepared.rows(), facts)
    return facts


def read(source: str, options: Options) -> Prepared:
    """Everything but the writing: see `prepare`."""
    table = read_source(source, split=options.hub_split)
    columns = guess_columns(options.columns, table.columns(), where=table.where)
    format = detect_format(table, columns) if options.format == "auto" else options.format
    if options.given_scores and format != "ranked":
        raise UserError("needs scored replies", where="--given-scores")
    if options.prompts is not None and format == "prompts":
        raise UserError("the source is a prompt list already", where="--prompts")
    prepared = Prepared(table, format)
    ranked, spare = _read_table(prepared, columns, options)
    prepared.seed = split(
        ranked,
        ift_share=options.ift_share,
        eval_share=options.eval_share,
        replies=prepared.reply_ledger,
    )
    if options.given_scores:
        prepared.seed.eft_train = _with_targets(prepared.seed.eft_train, ranked, options)
    prepared.prompts = _choose_prompts(ranked, spare, options, prepared)
    _refuse_nothing(prepared)
    _warn(prepared)
    return prepared


def detect_format(source: DataSource, columns: Columns) -> Format:
    """The format that the columns of the source speak for.

    Raises:
        UserError: They speak for none, or for two.
    """
    there = source.columns()
    if is_nested(source.rows[0]) or is_flat(there):
        return "oasst-trees"
    if is_pairs(there) or is_ranked(columns):
        return "ranked"
    if columns.prompt is not None and columns.response is None:
        return "prompts"
    what = "cannot tell the format"
    if columns.prompt is not None:
        what = "replies without a score or rank; cannot tell whether it is a prompt list"
    raise UserError(
        f"{what}. Columns: {', '.join(there)}",
        where=source.where,
        way_out="Say --format ranked with --score-column or --rank-column, or --format prompts "
        "with --prompt-column",
    )


def _read_table(
    prepared: Prepared, columns: Columns, options: Options
) -> tuple[list[RankedPrompt], list[Prompt]]:
    table, format = prepared.source, prepared.format
    replies, prompts, lang = prepared.reply_ledger, prepared.prompt_ledger, options.lang
    if format == "oasst-trees":
        return read_trees(table, lang=lang, replies=replies, prompts=prompts)
    if format == "prompts":
        prepared.notes += _column_notes(columns, options.columns, ("prompt", "prompt_id"))
        return [], read_prompts(table, columns, lang=lang, ledger=prompts)
    if is_pairs(table.columns()) and columns.response is None:
        prepared.notes.append("pairs from columns 'chosen' and 'rejected'")
        return read_pairs(table, columns, lang=lang, replies=replies), []
    used = ("prompt", "response", "rank", "score", "id", "prompt_id", "target")
    prepared.notes += _column_notes(columns, options.columns, used)
    return read_replies(table, columns, lang=lang, replies=replies)


def _column_notes(found: Columns, given: Columns, used: Sequence[str]) -> list[str]:
    guessed = [
        f"{name.replace('_', ' ')} from column {getattr(found, name)!r}"
        for name in used
        if getattr(found, name) is not None and getattr(given, name) is None
    ]
    return [f"guessed: {', '.join(guessed)}"] if guessed else []


def _with_targets(
    rows: Sequence[RankedReply], ranked: Sequence[RankedPrompt], options: Options
) -> list[RankedReply]:
    limits = options.score_range or score_range(ranked)
    if limits is None:
        raise UserError("the source has no scores", where="--given-scores")
    if not limits[0] < limits[1]:
        raise UserError("must run from a lower to a higher score", where="--score-range")
    if not options.target_range[0] < options.target_range[1]:
        raise UserError("must run from a lower to a higher score", where="--target-range")
    return [
        replace(
            row,
            target=score_target(row.quality, score_range=limits, target_range=options.target_range),
        )
        if row.quality is not None
        else row
        for row in rows
    ]


def _choose_prompts(
    ranked: Sequence[RankedPrompt],
    spare: Sequence[Prompt],
    options: Options,
    prepared: Prepared,
) -> list[Prompt]:
    seed = prepared.seed
    eft = {normalised(row.prompt) for row in (*seed.eft_train, *seed.eft_eval)}
    if options.prompts is not None:
        table = read_source(options.prompts, split=options.hub_split)
        columns = guess_columns(Columns(), table.columns(), where=table.where)
        prepared.prompt_ledger = Ledger()
        candidates = read_prompts(table, columns, lang=options.lang, ledger=prepared.prompt_ledger)
    elif ranked:
        ift = {row.prompt_id for row in seed.ift}
        label = prepared.source.label
        candidates = [*spare, *(Prompt(p.prompt_id, p.text, label) for p in ranked)]
        candidates.sort(
            key=lambda prompt: (prompt.prompt_id in ift, hash_order(prompt.prompt_id, "order"))
        )
    else:
        candidates = list(spare)
    return select_prompts(
        candidates,
        exclude=eft,
        min_chars=options.min_prompt_chars,
        max_chars=options.max_prompt_chars,
        ledger=prepared.prompt_ledger,
    )


def _refuse_nothing(prepared: Prepared) -> None:
    kept = prepared.prompts if prepared.format == "prompts" else prepared.seed.ift
    if kept or prepared.seed.eft_train or prepared.seed.eft_eval:
        return
    ledger = prepared.prompt_ledger if prepared.format == "prompts" else prepared.reply_ledger
    reasons = (
        f"{count} {reason} ({REASONS[reason]})"
        for reason, count in ledger.summary()["dropped"].items()
    )
    raise UserError(
        f"no row kept of {ledger.seen}: {'; '.join(reasons) or 'nothing in it has replies'}",
        where=prepared.source.where,
        way_out="--lang any keeps every language" if "other_language" in ledger.drops else None,
    )


def _warn(prepared: Prepared) -> None:
    if prepared.format == "prompts":
        return
    for name, rows in prepared.rows().items():
        if not rows:
            prepared.notes.append(f"{name} is empty")


def _check_out(out: Path, *, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("is a file, not a directory", where=str(out))
    found = [name for name in (*FILES, REPORT) if (out / name).exists()]
    if found and not force:
        raise UserError(
            f"holds {', '.join(found)} already",
            where=str(out),
            way_out="Choose another --out, or replace them with --force",
        )


def _write(out: Path, files: dict[str, Sequence[Record]], facts: dict[str, Any]) -> None:
    """Write all files beside the directory, then move them in; the report moves last."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(out)) from error
    try:
        for name, rows in files.items():
            write_records(draft / name, rows)
        write_json(draft / REPORT, facts)
        out.mkdir(exist_ok=True)
        for stale in (REPORT, *FILES):
            (out / stale).unlink(missing_ok=True)
        for name in (*files, REPORT):
            (draft / name).replace(out / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
