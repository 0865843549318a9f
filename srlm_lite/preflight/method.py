"""What a method asks of its recipe before a run begins."""

from __future__ import annotations

from pathlib import Path

from srlm_lite.judging import load_template
from srlm_lite.principles import load_principles
from srlm_lite.recipe import Recipe
from srlm_lite.run.files import read_jsonl
from srlm_lite.stages.seed_data import (
    prompt_file,
    ranked_file,
    read_human_answers,
    read_ift,
    read_prompts,
    read_ranked,
)


def check_method(recipe: Recipe) -> None:
    """The templates, principles and files that only the recipe's method reads.

    Raises:
        UserError: Names the first that cannot be read.
    """
    if recipe.method == "meta-rewarding":
        load_template(recipe.meta_rewarding.template, "first", "second")
    if recipe.method == "dno" and recipe.dno.grading == "side-by-side":
        load_template(recipe.dno.template, "prompt", "responses")
    if recipe.method == "dno" and recipe.dno.teacher not in (None, "server"):
        read_jsonl(Path(str(recipe.dno.teacher)))
    if recipe.method == "rlaif":
        load_principles(recipe.rlaif.principles)
        if recipe.rlaif.helpful:
            read_ift(recipe)


def prompts_of_method(recipe: Recipe) -> tuple[list[str], Path] | None:
    """The texts that the iterations take their prompts from, and their file.

    None where the anchor writes them.

    Raises:
        UserError: The file cannot be read.
    """
    if recipe.method in ("dpo", "rlhf"):
        ranked, path = read_ranked(ranked_file(recipe), None), ranked_file(recipe)
        if recipe.method == "dpo":
            return [group[0].prompt for group in ranked], path
    if recipe.method == "spin":
        answers, path = read_human_answers(recipe)
        return [row.prompt for row in answers], path
    if recipe.prompts.source == "file":
        path = prompt_file(recipe)
        return [row.text for row in read_prompts(path)], path
    return None
