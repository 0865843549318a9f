"""The seed data a recipe names, read and checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from srlm_lite.conversation import (
    Answerable,
    Asked,
    messages_of,
    with_both_faces,
    with_system,
)
from srlm_lite.data.text import begins_with_thought, words_of
from srlm_lite.engines import kind_of
from srlm_lite.errors import UserError, shorten
from srlm_lite.evaluate import ifeval
from srlm_lite.methods import METHODS
from srlm_lite.methods.base import Pool, SeedData
from srlm_lite.recipe import Recipe
from srlm_lite.records import Instruction, Prompt, RankedReply
from srlm_lite.run.files import read_jsonl, records_of
from srlm_lite.settings import DISTURBED_PROMPTS
from srlm_lite.window import admits_a_prompt

T = TypeVar("T")


class FilesOfRecipe(SeedData):
    """The seed data that a recipe names."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def prompts(self) -> Pool:
        """The recipe's prompt list."""
        path = prompt_file(self._recipe)
        return read_prompts(path), path

    def instructions(self) -> list[Instruction]:
        """Instruction data."""
        return read_ift(self._recipe)

    def ranked(self) -> tuple[list[list[RankedReply]], Path]:
        """Replies that humans ranked, by prompt, and their file."""
        path = ranked_file(self._recipe)
        return read_ranked(path, None), path

    def human_answers(self) -> tuple[list[Instruction], Path]:
        """One human answer a prompt, and their file."""
        return read_human_answers(self._recipe)

    def rows(self, path: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file that a setting names."""
        return read_jsonl(Path(path))


def data_file(recipe: Recipe, name: str) -> Path:
    """A file of the recipe's data directory.

    Raises:
        UserError: The directory or the file is missing.
    """
    directory = Path(recipe.data.dir)
    if not directory.is_dir():
        raise UserError(
            "no such data directory",
            where=f"data.dir = {recipe.data.dir}",
            way_out="Make one with `srlm-lite data prepare`, or set data.dir",
        )
    path = directory / name
    if not path.is_file():
        raise UserError(
            f"the data directory has no {name}",
            where=str(directory),
            way_out="Make it with `srlm-lite data prepare`, from replies that people have ranked; "
            "a prompt list goes beside them, by --prompts",
        )
    return path


def read_ift(recipe: Recipe) -> list[Instruction]:
    """Instruction data, cut to `anchor.ift_limit`.

    Raises:
        UserError: There is none, or a row has no text to answer, or no answer.
    """
    return _instructions(data_file(recipe, "ift.jsonl"))[: recipe.anchor.ift_limit]


def taught_thoughts(recipe: Recipe) -> int:
    """Rows that the anchor learns whose reply begins with a thought.

    Raises:
        UserError: As `read_ift`.
    """
    section = recipe.anchor
    if section.init != "base":
        return 0
    rows = [*(read_ift(recipe) if section.use_ift else ()), *read_extra(recipe)]
    return sum(begins_with_thought(row.response) for row in rows)


def read_extra(recipe: Recipe) -> list[Instruction]:
    """The anchor's extra rows; none where the recipe names no file."""
    named = recipe.data.extra
    return _instructions(Path(named)) if named else []


def answered_prompts(recipe: Recipe) -> list[Instruction]:
    """Prompts with the answer that a human gave, whatever of the data has them.

    Instruction data if the anchor learns it, else the best of the ranked replies; empty where the
    run reads neither, and cannot be read either.
    """
    for read in (read_ift if recipe.anchor.use_ift else None, _best_ranked):
        with contextlib.suppress(UserError):
            if read is not None:
                return read(recipe)
    return []


def _best_ranked(recipe: Recipe) -> list[Instruction]:
    return _best(read_ranked(ranked_file(recipe), recipe.anchor.eft_prompts))


def rows_of(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The rows of a data file, each with the text of what is asked, and its turns beyond one.

    Args:
        keys: Where that text may stand; the first one is where it is put if a row has none of them.

    Raises:
        UserError: As `read_jsonl`; or `messages` cannot be answered, or are not what the text says.
    """
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        key = next((one for one in keys if row.get(one) is not None), keys[0])
        try:
            rows.append(with_both_faces(row, key))
        except ValueError as error:
            raise UserError(f"row {number} {error}", where=str(path)) from error
    return rows


def _instructions(path: Path) -> list[Instruction]:
    rows = records_of(rows_of(path, "prompt"), Instruction, path)
    for number, row in enumerate(rows, start=1):
        for name in ("prompt", "response"):
            if not getattr(row, name).strip():
                raise UserError(f"row {number} has an empty {name}", where=str(path))
    return refuse_none(rows, path)


def read_ranked(path: Path, limit: int | None) -> list[list[RankedReply]]:
    """Ranked replies grouped by prompt, at most `limit` prompts, in the order of the file.

    Raises:
        UserError: Two replies share an id, or two prompts do; or a quality is no number.
    """
    groups: dict[str, list[RankedReply]] = {}
    rows = records_of(rows_of(path, "prompt"), RankedReply, path)
    _refuse_doubles((row.response_id for row in rows), "responses", path)
    for number, row in enumerate(rows, start=1):
        if row.quality is not None and not math.isfinite(row.quality):
            raise UserError(f"row {number}: `quality` is {row.quality}", where=str(path))
        group = groups.setdefault(row.prompt_id, [])
        # Or replies to different prompts would be compared.
        if group and (group[0].prompt, group[0].asked) != (row.prompt, row.asked):
            raise UserError(f"two prompts have the id {row.prompt_id}", where=str(path))
        group.append(row)
    return list(islice(groups.values(), limit))


def ranked_file(recipe: Recipe) -> Path:
    """The replies that humans ranked: `data.ranked`, else the judge data's."""
    named = recipe.data.ranked
    return Path(named) if named else data_file(recipe, "eft_train.jsonl")


def read_human_answers(recipe: Recipe) -> tuple[list[Instruction], Path]:
    """One human answer a prompt, and the file: the best of `data.ranked`, else `ift.jsonl`."""
    if recipe.data.ranked is None:
        rows, path = read_ift(recipe), data_file(recipe, "ift.jsonl")
        _refuse_doubles((row.prompt_id for row in rows), "prompts", path)
        return rows, path
    path = ranked_file(recipe)
    return _best(read_ranked(path, None)), path


def _best(groups: Iterable[Sequence[RankedReply]]) -> list[Instruction]:
    """The best reply of each prompt."""
    best = (min(group, key=lambda row: row.rank) for group in groups)
    return [Instruction(row.prompt_id, row.prompt, row.response, row.messages) for row in best]


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt list: texts, or the `messages` of conversations.

    Raises:
        UserError: A row has no text, messages that cannot be answered or are not what its text
            says, or two rows share an id.
    """
    prompts = []
    for number, row in enumerate(rows_of(path, "text", "prompt", "instruction"), start=1):
        text = row.get("text", row.get("prompt", row.get("instruction")))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"row {number} has no text", where=str(path))
        named = row.get("prompt_id")
        prompt_id = f"{path.stem}-{number}" if named is None else str(named)
        source, messages = str(row.get("source", path.name)), row.get("messages")
        prompts.append(Prompt(prompt_id, text, source, messages and tuple(messages)))
    _refuse_doubles((prompt.prompt_id for prompt in prompts), "prompts", path)
    return prompts


def prompts_to_disturb(recipe: Recipe) -> tuple[list[Prompt], Path]:
    """The prompts of which the anchor's pairs with a known loser are made, and their file.

    The first of the run's prompt list, or of IFT where the run has no list.

    Raises:
        UserError: There is neither.
    """
    path = prompt_file(recipe)
    if path.is_file() or not recipe.anchor.use_ift:
        prompts = read_prompts(path)
    else:
        path = data_file(recipe, "ift.jsonl")
        prompts = [Prompt.of(row, path.name) for row in read_ift(recipe)]
    wanted = recipe.anchor.eft_prompts or DISTURBED_PROMPTS
    return refuse_none(prompts, path)[:wanted], path


def policy_prompts(recipe: Recipe) -> list[Prompt]:
    """Held-out prompts for the evaluation: `eval_prompts.jsonl`, else those of the EFT eval set."""
    path = Path(recipe.data.dir) / "eval_prompts.jsonl"
    if path.is_file():
        prompts: Sequence[Prompt] = read_prompts(path)
    else:
        groups = read_ranked(data_file(recipe, "eft_eval.jsonl"), None)
        prompts = [Prompt.of(group[0], "eft_eval") for group in groups]
    return list(prompts[: recipe.evaluate.policy_prompts])


def ifeval_tasks(recipe: Recipe) -> list[ifeval.IfevalPrompt]:
    """IFEval's prompts, cut to `evaluate.ifeval_prompts`.

    Raises:
        UserError: Not such a file, an empty one, or the extra `eval` is not installed.
    """
    path = Path(str(recipe.evaluate.ifeval))
    tasks = ifeval.tasks_of(read_jsonl(path), where=str(path))[: recipe.evaluate.ifeval_prompts]
    if not tasks:
        raise UserError("is empty", where=str(path))
    return tasks


def refuse_held_out_among_training(recipe: Recipe) -> None:
    """That no prompt which measures a model is one that it learns from.

    Raises:
        UserError: One is, letter for letter.
    """
    held_out = _held_out(recipe)
    for path, texts in _learned_from(recipe).items():
        for where, text in held_out.items():
            if text in texts:
                same = sum(one in texts for one in held_out.values())
                raise UserError(
                    f"{same} of its prompts are also in {path}, which the run learns from; the "
                    f"first is {shorten(repr(text))}",
                    where=where.partition(":")[0],
                    way_out="Take them out of one of the two files: a model is not measured on "
                    "what it was taught",
                )


def nearly_held_out(recipe: Recipe) -> Iterator[str]:
    """Held-out prompts that the run learns from in the same words, a line for each file."""
    held_out = {words_of(text): text for text in _held_out(recipe).values()}
    for path, texts in _learned_from(recipe).items():
        shared = [held_out[words] for words in map(words_of, texts) if words in held_out]
        if shared:
            yield (
                f"{len(shared)} prompts of {path} are held-out ones in the same words, such as "
                f"{shorten(repr(shared[0]))}: figures on them flatter the model"
            )


def _held_out(recipe: Recipe) -> dict[str, str]:
    """The prompts that models are measured on, by their file and their place in it."""
    own = Path(recipe.data.dir) / "eval_prompts.jsonl"
    judge = data_file(recipe, "eft_eval.jsonl")
    policy = own if own.is_file() else judge
    found = {f"{policy}:{i}": row.text for i, row in enumerate(policy_prompts(recipe))}
    for i, group in enumerate(read_ranked(judge, recipe.evaluate.eft_prompts)):
        found[f"{judge}:eft {i}"] = group[0].prompt
    return found


def _learned_from(recipe: Recipe) -> dict[Path, set[str]]:
    """The prompts of each file that the run's adapters learn from."""
    found: dict[Path, set[str]] = {}
    trained = recipe.anchor.init == "base"
    if trained and recipe.anchor.use_ift:
        path = data_file(recipe, "ift.jsonl")
        found[path] = {row.prompt for row in read_ift(recipe)}
    if trained and recipe.anchor.use_eft and recipe.anchor.eft_targets == "disturbed":
        prompts, path = prompts_to_disturb(recipe)
        found[path] = {prompt.text for prompt in prompts}
    elif trained and recipe.anchor.use_eft:
        path = data_file(recipe, "eft_train.jsonl")
        found[path] = {group[0].prompt for group in read_ranked(path, recipe.anchor.eft_prompts)}
    if recipe.data.ranked is not None:
        path = ranked_file(recipe)
        found[path] = {group[0].prompt for group in read_ranked(path, None)}
    if recipe.iterations and recipe.prompts.source == "file":
        path = prompt_file(recipe)
        if path.is_file():
            found[path] = {prompt.text for prompt in read_prompts(path)}
    return found


def shapes_asked(recipe: Recipe, listed: Pool | None) -> dict[tuple[str, ...], tuple[str, Asked]]:
    """What the base is asked as the policy: of each succession of roles one, with its file.

    The recipe's system message is in it, and told of in the file's place where a single user turn
    is all that comes behind it.

    Args:
        listed: The prompts of the iterations.

    Raises:
        UserError: A file cannot be read.
    """
    own = Path(recipe.data.dir) / "eval_prompts.jsonl"
    held_out = own if own.is_file() else data_file(recipe, "eft_eval.jsonl")
    found: list[tuple[Path, Sequence[Answerable]]] = [(held_out, policy_prompts(recipe))]
    extra: list[Instruction] = []
    if listed is not None:
        found.append((listed[1], listed[0]))
    if recipe.anchor.init == "base":
        extra = read_extra(recipe)
        if recipe.anchor.use_ift:
            found.append((data_file(recipe, "ift.jsonl"), read_ift(recipe)))
    if METHODS[recipe.method].learns_ranked and recipe.iterations:
        path = ranked_file(recipe)
        found.append((path, [group[0] for group in read_ranked(path, None)]))
    system = recipe.base.system
    asked = [("base.system", with_system("Hello", system))]
    asked += [(str(path), with_system(row.asked, system)) for path, rows in found for row in rows]
    asked += [(str(recipe.data.extra), row.asked) for row in extra]
    shapes: dict[tuple[str, ...], tuple[str, Asked]] = {}
    for where, one in asked:
        shapes.setdefault(tuple(turn["role"] for turn in messages_of(one)), (where, one))
    return shapes


def unmeasured(recipe: Recipe) -> Iterator[str]:
    """What the evaluation is going to leave out, because there is nothing to measure it on."""
    path = data_file(recipe, "eft_eval.jsonl")
    if not read_ranked(path, recipe.evaluate.eft_prompts):
        yield f"{path} is empty: the judge's accuracy is not measured"
    if recipe.evaluate.policy_prompts and not policy_prompts(recipe):
        own = Path(recipe.data.dir) / "eval_prompts.jsonl"
        empty = own if own.is_file() else path
        yield f"{empty} is empty: the policy's held-out answers are not measured"


def check_window(recipe: Recipe, *, thought: int = 0) -> None:
    """That a prompt fits the window beside what is to be written after it.

    Args:
        thought: Tokens that come before an answer, where the base thinks.

    Raises:
        UserError: None does, whatever its length.
    """
    judge, window = recipe.judge, recipe.base.window
    shortest = {"rollout.max_new_tokens": recipe.rollout.max_new_tokens}
    if not kind_of(recipe, "judge").remote:  # a server has a window of its own
        shortest["judge.max_new_tokens"] = min(judge.max_new_tokens, judge.retry_max_new_tokens)
    for key, tokens in shortest.items():
        if not admits_a_prompt(window, answer=tokens, thought=thought):
            beside = f" and a thought of rollout.max_thought_tokens = {thought}" if thought else ""
            raise UserError(
                f"leaves no room for a prompt{beside} in base.window = {window}",
                where=f"{key} = {tokens}",
                way_out="Lower it, or raise base.window" if not thought else "Lower one of them",
            )


def prompts_suffice(recipe: Recipe, count: int, path: Path) -> int:
    """How many prompts all iterations want, of the `count` that a file has.

    Raises:
        UserError: There are too few.
    """
    section = recipe.prompts
    times = 1 if section.reuse else recipe.iterations
    wanted = times * section.per_iteration
    if count < wanted:
        several = f"{times} iterations of " if times > 1 else ""
        way_out = "Lower prompts.per_iteration, or give more"
        raise UserError(
            f"has {count} prompts, and {wanted} are wanted: "
            f"{several}prompts.per_iteration = {section.per_iteration}",
            where=str(path),
            way_out=f"{way_out}, or set prompts.reuse=true" if times > 1 else way_out,
        )
    return wanted


def prompt_file(recipe: Recipe) -> Path:
    """The list that the iterations take their prompts from."""
    named = recipe.prompts.file
    return Path(named) if named else data_file(recipe, "prompts.jsonl")


def refuse_none(rows: list[T], path: Path) -> list[T]:
    """The rows of a file that must have some.

    Raises:
        UserError: It has none.
    """
    if not rows:
        raise UserError(
            "is empty",
            where=str(path),
            way_out="Give rows, or leave such data out: anchor.use_ift=false, anchor.use_eft=false",
        )
    return rows


def _refuse_doubles(ids: Iterable[str], what: str, path: Path) -> None:
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise UserError(f"two {what} have the id {one}", where=str(path))
        seen.add(one)
