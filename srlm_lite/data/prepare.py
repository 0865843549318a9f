"""`srlm-lite data prepare`: what people have becomes the seed data of a run.

The directory it writes holds

- `ift.jsonl`: prompts with their best reply;
- `eft_train.jsonl`, `eft_eval.jsonl`: other prompts with all their replies, in people's order;
- `prompts.jsonl`: prompts for the policy. From `--prompts` where given; otherwise the prompts of
  the sources that went into neither part, then those of IFT. Never an EFT prompt;
- `eval_prompts.jsonl`: held-out prompts for the policy, where `--eval` gives prompts;
- `prepare.json`: what was asked for, and how many rows were kept and dropped, and why.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from srlm_lite.data.columns import OPTIONS, Columns, column_needed
from srlm_lite.data.gather import (
    TABLES,
    Table,
    index,
    put_by,
    ranked_prompts,
    read_asked,
    refuse_no_order,
    spare_prompts,
)
from srlm_lite.data.ledger import REASONS, Ledger
from srlm_lite.data.oasst import read_trees
from srlm_lite.data.prompts import PromptList
from srlm_lite.data.ranked import score_target
from srlm_lite.data.row_store import RowStore, remove_left
from srlm_lite.data.shapes import (
    Format,
    SeenColumns,
    check_given,
    has_replies,
    order_of,
    refuse_losses,
    shape_of,
    unused,
    unused_within,
)
from srlm_lite.data.sources import DataSource, read_source
from srlm_lite.data.split import Part, Purpose, RankedPrompt, Sharing
from srlm_lite.data.text import words_of
from srlm_lite.errors import UserError
from srlm_lite.progress import Reporter, Silent
from srlm_lite.records import Prompt, RankedReply, Record
from srlm_lite.run.files import jsonl_line, read_json, write_json

FILES = ("ift.jsonl", "eft_train.jsonl", "eft_eval.jsonl", "prompts.jsonl")
HELD_OUT = "eval_prompts.jsonl"
REPORT = "prepare.json"
PARTS: dict[str, Part] = {
    "ift.jsonl": "ift",
    "eft_train.jsonl": "eft_train",
    "eft_eval.jsonl": "eft_eval",
    "eval_prompts.jsonl": "eval_prompts",
}
MEGABYTE = 1 << 20


Given = Purpose | Literal["prompts"]
"""What a source is given for."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to make of the sources."""

    format: Format | Literal["auto"] = "auto"
    """What the source that is shared out may hold."""
    prompts: str | None = None
    """A source of prompts for `prompts.jsonl`."""
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
    """Default: the lowest and highest score there is."""
    target_range: tuple[int, int] = (0, 5)
    min_prompt_chars: int = 10
    max_prompt_chars: int = 2000
    ift: str | None = None
    """A source of answers, for `ift.jsonl` alone."""
    ranked: str | None = None
    """A source of replies in an order, for EFT alone where IFT has a source of its own."""
    eval: str | None = None
    """A source to hold out: replies in an order, or prompts."""
    hub_config: str | None = None
    ignore: tuple[str, ...] = ()
    """Columns that need not be used."""


@dataclass(frozen=True, slots=True)
class Use:
    """A source and what it is for."""

    purpose: Given
    table: Table
    notes: tuple[str, ...]
    left: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """As JSON: how the source was read."""
        columns = {role: list(names) for role, names in self.table.at.items()}
        return {
            "for": self.purpose,
            "source": self.table.source.where,
            "shape": self.table.shape.name,
            "columns": columns,
            "unused": list(self.left),
            "rows": self.table.source.count,
        }


@dataclass(slots=True)
class Prepared:
    """Rows for the files, and the account of them; good while the store is open."""

    uses: Sequence[Use]
    format: Format
    sharing: Sharing
    listed: PromptList
    options: Options
    reply_ledger: Ledger = field(default_factory=Ledger)
    prompt_ledger: Ledger = field(default_factory=Ledger)
    notes: list[str] = field(default_factory=list)
    scratch: Path = field(kw_only=True)
    """A folder on the disk of the result, gone with the store."""

    def rows(self) -> dict[str, Callable[[], Iterator[Record]]]:
        """What each file holds; a prompt list makes `prompts.jsonl` alone."""
        ift, train, held, prompts = FILES
        found: dict[str, Callable[[], Iterator[Record]]] = {}
        if not all(map(_only_asks, self.uses)):
            found[ift] = self.sharing.instructions
            found[train] = partial(self._targeted, "eft_train")
            found[held] = partial(self.sharing.ranked, "eft_eval")
        found[prompts] = self.listed.chosen
        if self.sharing.count("eval_prompts"):
            found[HELD_OUT] = self.sharing.held_out
        return found

    def _targeted(self, part: Literal["eft_train"]) -> Iterator[RankedReply]:
        rows = self.sharing.ranked(part)
        return _with_targets(rows, self._limits(), self.options) if self._scored else rows

    @property
    def _scored(self) -> bool:
        return self.options.given_scores

    def _limits(self) -> tuple[float, float]:
        limits = self.options.score_range or self.sharing.qualities
        if limits is None:
            raise UserError("the source has no scores", where="--given-scores")
        return limits

    def check_targets(self) -> None:
        """That known scores can be written as targets, where that is asked for.

        Raises:
            UserError: There are none, or a range is empty.
        """
        if not self._scored:
            return
        ranges = (("--score-range", self._limits()), ("--target-range", self.options.target_range))
        for where, (low, high) in ranges:
            if not low < high:
                raise UserError("must run from a lower to a higher score", where=where)

    def prompts_of(self, name: str) -> int:
        """How many prompts a file has."""
        if name == "prompts.jsonl":
            return self.prompt_ledger.kept
        return self.sharing.count(PARTS[name])

    def summary(self, rows: dict[str, int]) -> dict[str, Any]:
        """As JSON: rows and prompts of each file, and both ledgers."""
        return {
            "source": ", ".join(dict.fromkeys(use.table.source.where for use in self.uses)),
            "format": self.format,
            "sources": [use.summary() for use in self.uses],
            "files": {
                name: {"rows": count, "prompts": self.prompts_of(name)}
                for name, count in rows.items()
            },
            "replies": self.reply_ledger.summary(),
            "prompts": self.prompt_ledger.summary(),
            "notes": self.notes,
        }


def prepare(
    source: str | None,
    out: Path,
    options: Options,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Read the sources, write the data directory, return what `prepare.json` holds.

    Args:
        source: Is shared out between all parts; None where the options name a source for each.

    Raises:
        UserError: Whatever is wrong with a source or the options; `out` holds data already and
            `force` is not set; or no row was kept.
    """
    near = _existing(out)
    for place in {near, out, out.parent}:  # where one may have been killed that had got further
        remove_left(place)
    _check_out(out, force=force, held_out=options.eval is not None)
    _refuse_unwritable(near, out)
    with read(source, options, near=near, reporter=reporter or Silent()) as prepared:
        _check_out(out, force=force, held_out=options.eval is not None)  # it may have taken hours
        return _write(out, prepared)


@contextmanager
def read(
    source: str | None,
    options: Options,
    *,
    near: Path | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Prepared]:
    """Everything but the writing: see `prepare`.

    Args:
        near: A folder on the disk that has room for all that is read.
    """
    reporter = reporter or Silent()
    uses = _uses(source, options, reporter)
    format = _format(uses)
    with RowStore(near) as store:
        replies, prompts = Ledger(), Ledger()
        limits = {"min_chars": options.min_prompt_chars, "max_chars": options.max_prompt_chars}
        listed = PromptList(store, prompts, **limits)
        prepared = Prepared(
            uses,
            format,
            Sharing(store, replies),
            listed,
            options,
            replies,
            prompts,
            scratch=store.folder,
        )
        prepared.notes += [note for use in uses for note in use.notes]
        _share_out(prepared, store, reporter)
        prepared.check_targets()
        _refuse_nothing(prepared)
        _warn(prepared)
        yield prepared


# What the sources are


def _uses(source: str | None, options: Options, reporter: Reporter) -> list[Use]:
    as_what: dict[str, Given] = {"prompts": "prompts", "ift": "ift"}
    named: tuple[tuple[Given, str | None], ...] = (
        (as_what.get(options.format, "source"), source),
        ("ift", options.ift),
        ("ranked", options.ranked),
        ("eval", options.eval),
        ("prompts", options.prompts),
    )
    given = [(purpose, name) for purpose, name in named if name is not None]
    if not given:
        raise UserError(
            "nothing to read", way_out="Give --source, or --ift, --ranked, --prompts, --eval"
        )
    tables = [(purpose, _opened(name, options, reporter)) for purpose, name in given]
    columns = {name for _, table in tables for name in table.columns()}
    for name in options.ignore:
        if name not in columns:
            raise UserError(
                f"no column {name!r}; there: {', '.join(sorted(columns))}", where="--ignore-column"
            )
    several = len(tables) > 1
    uses = [
        _use(purpose, table, number, options, columns, several=several)
        for number, (purpose, table) in enumerate(tables)
    ]
    _refuse_useless(uses, options)
    return uses


def _opened(name: str, options: Options, reporter: Reporter) -> DataSource:
    """A source whose columns are known."""
    path = Path(name)
    size = path.stat().st_size // MEGABYTE if path.is_file() else 0
    task = reporter.start(f"columns of {path.name}", size, "MB") if size else None
    read = [0]

    def watch(count: int) -> None:
        read[0] += count
        if task is not None and read[0] >= MEGABYTE:
            task.advance(read[0] // MEGABYTE)
            read[0] %= MEGABYTE

    table = read_source(name, split=options.hub_split, config=options.hub_config, watch=watch)
    table.profile()
    task = None  # the file is read again later, under a bar that counts rows
    return table


def _use(
    purpose: Given,
    source: DataSource,
    number: int,
    options: Options,
    everywhere: Iterable[str],
    *,
    several: bool,
) -> Use:
    seen = SeenColumns(source.where, source.profile(), options.columns, frozenset(options.ignore))
    check_given(seen, elsewhere={*(everywhere if several else ()), *_within(seen)})
    table = _recognised(purpose, source, seen, options)
    # A list that goes with replies keeps its own ids, as do the replies.
    alone = not several or purpose == "prompts" or number == 0
    table = replace(table, number=number, prefix="" if alone else f"{source.label}:")
    if table.shape.format != "oasst-trees":
        refuse_losses(seen, table.shape, table.at, only_asks=purpose == "prompts")
    if purpose == "ranked":
        refuse_no_order(table)
    left: tuple[str, ...] = (
        ()
        if table.shape.format == "oasst-trees"
        else (
            *unused(seen, table.at),
            *unused_within(seen, table.at),
        )
    )
    about = f"{source.label}: " if several else ""
    notes = [*source.notes, *_guesses(table, options.columns)]
    if left:
        notes.append(f"not used: {', '.join(left)}")
    return Use(purpose, table, tuple(f"{about}{note}" for note in notes), left)


def _within(seen: SeenColumns) -> set[str]:
    """Keys of objects in lists: scores stand there too."""
    return {
        key
        for column in seen.columns.values()
        for cell in column.cells[:20]
        if isinstance(cell, list)
        for entry in cell
        if isinstance(entry, dict)
        for key in entry
    }


def _recognised(purpose: Given, source: DataSource, seen: SeenColumns, options: Options) -> Table:
    """The source with the shape that it is read by.

    Raises:
        UserError: Its columns speak for none.
    """
    every: tuple[Format, ...] = ("oasst-trees", "ranked", "ift", "prompts")
    wanted = every
    if purpose == "source" and options.format != "auto":
        wanted = (options.format,)
    elif purpose in ("ift", "ranked"):
        wanted = every[:3]
    found = shape_of(seen, wanted)
    if purpose == "prompts" and (found is None or found[0].format != "oasst-trees"):
        alone = shape_of(seen, ("prompts",))
        if alone is not None and "prompt" in alone[1] and not _ends_in_replies(seen, alone[1]):
            found = alone
    if found is not None:
        return Table(source, *found, order_of(*found))
    if purpose == "prompts":
        raise column_needed(source, "no column for the prompt", OPTIONS["prompt"])
    if options.format == "oasst-trees" and purpose == "source":
        row = next(iter(source.rows))
        raise UserError(
            f"neither a message tree nor a message; its keys: {', '.join(row)}",
            where=f"{source.where}, row 1",
            way_out="Trees have prompt.replies; messages message_id, parent_id, text, role",
        )
    if purpose in ("ift", "ranked") or options.format == "ranked":
        asks, answers = (shape_of(seen, (kind,)) for kind in ("prompts", "ift"))
        if asks is None:
            raise column_needed(source, "no column for the prompt", OPTIONS["prompt"])
        if answers is None:
            raise column_needed(source, "no column for the response", OPTIONS["response"])
        options_ = "--score-column or --rank-column"
        raise column_needed(source, "no column orders the replies", options_)
    if shape_of(seen, ("prompts",)) is None and has_replies(seen):
        raise column_needed(source, "no column for the prompt", OPTIONS["prompt"])
    raise UserError(
        f"cannot tell the format. Columns: {', '.join(seen.columns)}",
        where=source.where,
        way_out="Say --format ranked with --score-column or --rank-column, or --format prompts "
        "with --prompt-column",
    )


def _ends_in_replies(seen: SeenColumns, at: Any) -> bool:
    """Whether the column of the prompt holds dialogues, with their replies."""
    cells = seen.columns[at["prompt"][0]].cells
    return any(not isinstance(cell, str) for cell in cells) and shape_of(seen, ("ift",)) is not None


def _guesses(table: Table, given: Columns) -> Iterator[str]:
    """What was told by its name, a line each."""
    named = {getattr(given, one.name) for one in fields(Columns)}
    for role, names in table.at.items():
        if named.isdisjoint(names):
            columns = ", ".join(repr(name) for name in names)
            kind = "column" if len(names) == 1 else "columns"
            if role.endswith(" within"):
                role, kind = role.removesuffix(" within"), f"{table.at['replies'][0]!r}:"
            yield f"guessed: {role.replace('_', ' ')} from {kind} {columns}"


def _refuse_useless(uses: Sequence[Use], options: Options) -> None:
    replied = [use for use in uses if use.purpose != "prompts"]
    asking = [use for use in replied if use.table.shape.format == "prompts"]
    if options.given_scores and not any(use.table.shape.format == "ranked" for use in replied):
        raise UserError("needs scored replies", where="--given-scores")
    source = next((use for use in uses if use.purpose in ("source", "prompts")), None)
    lists = sum(use.purpose == "prompts" for use in uses)
    if options.prompts is not None and (source in asking or lists > 1):
        raise UserError("the source is a prompt list already", where="--prompts")
    read = {name for use in uses for names in use.table.at.values() for name in names}
    for one in fields(Columns):
        name = getattr(options.columns, one.name)
        trees = any(use.table.shape.format == "oasst-trees" for use in uses)
        asks = options.format == "prompts"
        if name is not None and name not in read and not trees and not asks:
            shapes = ", ".join(use.table.shape.name for use in uses)
            raise UserError(
                f"is not read from what is told as {shapes}", where=f"{OPTIONS[one.name]} {name}"
            )


def _format(uses: Sequence[Use]) -> Format:
    """What the sources are, by the one that is shared out, or by the most that they give."""
    first = uses[0]
    if first.purpose == "prompts":
        return "prompts"
    formats = [use.table.shape.format for use in uses if use.purpose != "prompts"]
    if first.purpose == "source":
        return formats[0]
    return max(formats, key=("prompts", "ift", "ranked", "oasst-trees").index)


# Sharing out


def _share_out(prepared: Prepared, store: RowStore, reporter: Reporter) -> None:
    """Read all rows, and say what becomes of each."""
    options, sharing = prepared.options, prepared.sharing
    lists = [use for use in prepared.uses if _only_asks(use)]
    replied = [use for use in prepared.uses if not _only_asks(use)]
    for table in TABLES:
        store.make(table)
    spare: list[Callable[[], Iterable[Prompt]]] = []
    trees: dict[int, list[RankedPrompt]] = {}
    for use in replied:
        task = reporter.start(use.table.source.label, use.table.source.count or 0, "rows")
        if use.table.shape.format == "oasst-trees":
            ledgers = {"replies": prepared.reply_ledger, "prompts": prepared.prompt_ledger}
            trees[use.table.number], more = read_trees(
                use.table.source, lang=options.lang, **ledgers
            )
            spare.append(partial(iter, more))
        else:
            put_by(
                use.table,
                store,
                lang=options.lang,
                replies=prepared.reply_ledger,
                tick=task.advance,
            )
            if use.purpose != "eval":
                spare.append(partial(spare_prompts, use.table, store))
    index(store)
    for use in replied:
        found: Iterable[RankedPrompt] = trees.pop(use.table.number, [])
        if use.table.shape.format != "oasst-trees":
            found = ranked_prompts(use.table, store, prepared.reply_ledger)
        if use.purpose == "eval" and use.table.order == "none":
            _hold_out(prepared, (_as_prompt(one, use) for one in found))
        elif use.purpose != "prompts":
            sharing.add(found, use.purpose, use.table.source.label)
    for use in lists:
        if use.purpose == "eval":
            _hold_out(prepared, _asked(use, prepared, reporter))
    sharing.decide(ift_share=options.ift_share, eval_share=options.eval_share)
    _choose_prompts(prepared, lists, spare, reporter)


def _only_asks(use: Use) -> bool:
    return use.purpose == "prompts" or use.table.shape.format == "prompts"


def _as_prompt(found: RankedPrompt, use: Use) -> Prompt:
    return Prompt(found.prompt_id, found.text, use.table.source.label, found.messages)


def _hold_out(prepared: Prepared, prompts: Iterable[Prompt]) -> None:
    """Prompts to measure the policy on: each once, and none without words."""
    seen: set[str] = set()

    def once() -> Iterator[Prompt]:
        for prompt in prompts:
            words = words_of(prompt.text)
            if prompt.text.strip() and words not in seen:
                seen.add(words)
                yield prompt

    prepared.sharing.hold_out(once())


def _asked(use: Use, prepared: Prepared, reporter: Reporter) -> Iterator[Prompt]:
    """The prompts of a source, whatever else it has."""
    table, ledger, lang = use.table, prepared.prompt_ledger, prepared.options.lang
    if table.shape.format == "oasst-trees":
        ranked, spare = read_trees(table.source, lang=lang, replies=Ledger(), prompts=ledger)
        yield from spare
        yield from (_as_prompt(one, use) for one in ranked)
        return
    task = reporter.start(table.source.label, table.source.count or 0, "rows")
    yield from read_asked(table, lang=lang, ledger=ledger, tick=task.advance)


def _choose_prompts(
    prepared: Prepared,
    lists: Sequence[Use],
    spare: Sequence[Callable[[], Iterable[Prompt]]],
    reporter: Reporter,
) -> None:
    own = [use for use in lists if use.purpose != "eval"]
    if own:
        # What trees have said of prompts that serve for nothing is another list's account.
        prepared.prompt_ledger.seen = 0
        prepared.prompt_ledger.drops.clear()
    for use in own:
        prepared.listed.add(_asked(use, prepared, reporter))
        prepared.listed.refuse_reused_ids(use.table.source)
    if not own:
        for found in spare:
            prepared.listed.add(found())
        prepared.listed.add(prepared.sharing.asked())
    prepared.listed.decide(shuffled=not own)


def _with_targets(
    rows: Iterable[RankedReply], limits: tuple[float, float], options: Options
) -> Iterator[RankedReply]:
    for row in rows:
        if row.quality is None:
            yield row
        else:
            target = score_target(
                row.quality, score_range=limits, target_range=options.target_range
            )
            yield replace(row, target=target)


def _refuse_nothing(prepared: Prepared) -> None:
    asks = all(_only_asks(use) for use in prepared.uses)
    if prepared.prompt_ledger.kept if asks else prepared.reply_ledger.kept:
        return
    ledger = prepared.prompt_ledger if asks else prepared.reply_ledger
    reasons = (
        f"{count} {reason} ({REASONS[reason]})"
        for reason, count in ledger.summary()["dropped"].items()
    )
    raise UserError(
        f"no row kept of {ledger.seen}: {'; '.join(reasons) or 'nothing in it has replies'}",
        where=prepared.uses[0].table.source.where,
        way_out="--lang any keeps every language" if "other_language" in ledger.drops else None,
    )


def _warn(prepared: Prepared) -> None:
    names = prepared.rows()
    if len(names) > 1:
        empty = [name for name in names if not prepared.prompts_of(name)]
        prepared.notes += [f"{name} is empty" for name in empty]


# The directory


def _check_out(out: Path, *, force: bool, held_out: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("is a file, not a directory", where=str(out))
    names = (*FILES, *([HELD_OUT] if held_out else []), REPORT)
    found = [name for name in names if (out / name).exists()]
    if found and not force:
        raise UserError(
            f"holds {', '.join(found)} already",
            where=str(out),
            way_out="Choose another --out, or replace them with --force",
        )


def _existing(out: Path) -> Path:
    """The folder to be written, or the nearest above it that is there: on the same disk, even
    where a disk is mounted at the first."""
    there = out.absolute()
    return next(one for one in (there, *there.parents) if one.is_dir())


def _refuse_unwritable(folder: Path, out: Path) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError(f"is a link to {os.readlink(out)}, which is not there", where=str(out))
    above = next((one for one in out.absolute().parents if one.exists()), folder)
    if not above.is_dir():
        raise UserError(f"lies below {above}, which is a file", where=str(out))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot be written ({os.strerror(errno.EACCES)})", where=str(out))


def _write(out: Path, prepared: Prepared) -> dict[str, Any]:
    """Write all files apart, then give the folder its name: whole, or not at all.

    Where the folder is there already they move into it one by one, the report last.
    """
    draft = prepared.scratch / "draft"
    draft.mkdir()
    files = prepared.rows()
    counts = {name: _write_rows(draft / name, rows()) for name, rows in files.items()}
    facts = {**prepared.summary(counts), "options": asdict(prepared.options)}
    write_json(draft / REPORT, facts)
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(out)
        return facts
    for stale in (*_held_out_before(out), *FILES, REPORT):
        (out / stale).unlink(missing_ok=True)
    for name in (*files, REPORT):
        (draft / name).replace(out / name)
    return facts


def _held_out_before(out: Path) -> list[str]:
    """Held-out prompts that an earlier call wrote; others are the user's own."""
    try:
        written = read_json(out / REPORT, files=dict)["files"]
    except UserError:
        return []
    return [HELD_OUT] if HELD_OUT in written else []


def _write_rows(path: Path, rows: Iterable[Record]) -> int:
    """Write a JSONL file row by row, and count them."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(jsonl_line(row))
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count
