"""The recipe's files and data: that they are there, can be read, and suffice."""

from __future__ import annotations

from pathlib import Path

from srlm_lite.engines import engines_of
from srlm_lite.errors import UserError
from srlm_lite.evaluate import ifeval
from srlm_lite.evaluate.gold import load_gold
from srlm_lite.forms import form_of
from srlm_lite.judging import load_rubric
from srlm_lite.methods import method_of
from srlm_lite.preflight.launch import Launch, Seen
from srlm_lite.questions import load_question
from srlm_lite.recipe import Recipe
from srlm_lite.shipped import CHAT_TEMPLATES, shipped_text
from srlm_lite.stages.anchor import given_targets, lessons_of
from srlm_lite.stages.seed_data import (
    FilesOfRecipe,
    check_window,
    data_file,
    ifeval_tasks,
    nearly_held_out,
    policy_prompts,
    prompts_suffice,
    prompts_to_disturb,
    ranked_file,
    read_extra,
    read_ift,
    read_ranked,
    refuse_held_out_among_training,
    refuse_none,
    unmeasured,
)


def engines(launch: Launch) -> Seen:
    """That every engine of the run can be started, as far as that shows without starting it."""
    kinds = engines_of(launch.recipe)
    for kind in kinds:
        kind.check(launch.recipe)
        if not launch.goes_on:  # an earlier version let one stand there
            kind.discreet(launch.recipe)
    return Seen(", ".join(kind.name for kind in kinds))


def judge(launch: Launch) -> Seen:
    """The rubric, what the form of judging reads beside it, and that two scores can be as far
    apart as a pair's have to be."""
    recipe, form = launch.recipe, form_of(launch.recipe)
    rubric, gap = load_rubric(recipe.judge.rubric), recipe.pairing.min_gap
    form.preflight()
    low, high = form.scale(rubric)
    if recipe.judge_makes_pairs and gap >= high - low:
        whose = f"the rubric {rubric.name}"
        if (low, high) != (rubric.min, rubric.max):
            whose = f"judge.form={form.name}"
        raise UserError(
            f"no two scores of {whose} differ by more than {gap:g}: it goes from "
            f"{low:g} to {high:g}",
            where="pairing.min_gap",
            way_out="Lower it",
        )
    return Seen(f"rubric {rubric.name}, {rubric.min:g} to {rubric.max:g}")


def files(launch: Launch) -> Seen:
    """What the recipe names beside its data: a chat template, an anchor, a gold scorer."""
    recipe, named = launch.recipe, []
    if recipe.base.chat_template is not None:
        shipped_text(CHAT_TEMPLATES, name=recipe.base.chat_template)
        named.append("chat template")
    if recipe.anchor.init != "base":
        if not Path(recipe.anchor.init).is_dir():
            raise UserError("no such directory", where=f"anchor.init = {recipe.anchor.init}")
        named.append("anchor")
    if recipe.evaluate.gold is not None:
        load_gold(recipe.evaluate.gold)
        named.append("gold scorer")
    if recipe.evaluate.ifeval is not None:
        ifeval_tasks(recipe)
        named.append("IFEval")
    if recipe.evaluate.tasks:
        ifeval.check_installed()
        named.append("capability panel")
    return Seen(", ".join(named) or "none named", asked=bool(named))


def data(launch: Launch) -> Seen:
    """The seed data that the anchor and the evaluation read."""
    recipe, counted = launch.recipe, {}
    trained = recipe.anchor.init == "base"
    if (trained and recipe.anchor.use_ift) or recipe.prompts.source == "self-instruct":
        counted["IFT rows"] = len(read_ift(recipe))
    if trained and recipe.data.extra:
        counted["extra rows"] = len(read_extra(recipe))
    if trained and recipe.anchor.use_eft and recipe.anchor.eft_targets == "disturbed":
        load_question("disturb", recipe.anchor.disturb_template)
        counted["prompts to disturb"] = len(prompts_to_disturb(recipe)[0])
    elif trained and recipe.anchor.use_eft:
        path = data_file(recipe, "eft_train.jsonl")
        groups = refuse_none(read_ranked(path, recipe.anchor.eft_prompts), path)
        counted["EFT prompts"] = len(groups)
    held_out = read_ranked(data_file(recipe, "eft_eval.jsonl"), recipe.evaluate.eft_prompts)
    counted["held-out EFT prompts"] = len(held_out)
    counted["held-out prompts"] = len(policy_prompts(recipe))
    told = ", ".join(f"{count:,} {name}" for name, count in counted.items())
    return Seen(told, tuple(unmeasured(recipe)))


def judge_data(launch: Launch) -> Seen:
    """That the anchor's judge data says what is to be learned, in the judge's own scores."""
    recipe = launch.recipe
    section = recipe.anchor
    trained = section.init == "base" and section.use_eft
    if trained and form_of(recipe).has_lessons and section.eft_targets != "disturbed":
        path, rubric = ranked_file(recipe), load_rubric(recipe.judge.rubric)
        lessons = lessons_of(recipe, read_ranked(path, section.eft_prompts), rubric, path)
        return Seen(f"{len(lessons):,} questions of judge.form={recipe.judge.form}")
    if not trained or section.eft_targets != "given":
        return Seen("its targets are made", asked=False)
    path = data_file(recipe, "eft_train.jsonl")
    rows = given_targets(
        read_ranked(path, section.eft_prompts), load_rubric(recipe.judge.rubric), path
    )
    return Seen(f"{len(rows):,} targets, each with a score")


def held_out(launch: Launch) -> Seen:
    """That nothing which measures a model is learned from; of a run that goes on it was asked."""
    if not launch.goes_on:
        refuse_held_out_among_training(launch.recipe)
    return Seen("apart from what is learned", tuple(nearly_held_out(launch.recipe)))


def method(launch: Launch) -> Seen:
    """What the method alone reads."""
    method_of(launch.recipe).preflight(FilesOfRecipe(launch.recipe))
    if not launch.goes_on:
        refuse_no_pairs(launch.recipe)
    return Seen(launch.recipe.method)


def refuse_no_pairs(recipe: Recipe) -> None:
    """Refuse settings with which no iteration can find the pairs that it has to.

    Raises:
        UserError: Samples that are all alike make none, or more are wanted than can be.
    """
    if not recipe.iterations or not method_of(recipe).pairs_samples:
        return
    if not recipe.rollout.temperature:
        raise UserError(
            "all samples of a prompt are alike, and a pair is two that differ",
            where="rollout.temperature = 0",
            way_out="Raise it, to 0.7 for example",
        )
    asked, n, wanted = recipe.prompts.per_iteration, recipe.rollout.n, recipe.pairing.min_pairs
    most = asked * n * (n - 1) // 2
    if wanted > most:
        raise UserError(
            f"{asked:,} prompts with {n} samples each make {most:,} pairs at most",
            where=f"pairing.min_pairs = {wanted}",
            way_out="Lower it, or raise prompts.per_iteration",
        )


def window(launch: Launch) -> Seen:
    """That prompt and answer fit the window, whatever the prompt."""
    recipe = launch.recipe
    if not recipe.iterations:
        return Seen("no iterations", asked=False)
    check_window(recipe)
    return Seen(f"{recipe.base.window} tokens")


def prompts(launch: Launch) -> Seen:
    """That there are prompts for every iteration: the last one is not the first to miss them."""
    recipe = launch.recipe
    if not recipe.iterations:
        return Seen("no iterations", asked=False)
    pool = method_of(recipe).pool(FilesOfRecipe(recipe))
    if pool is None:
        return Seen("the anchor writes them", asked=False)
    listed, path = pool
    wanted = prompts_suffice(recipe, len(listed), path)
    return Seen(f"{len(listed):,}, and {wanted:,} are wanted")


INPUTS = (engines, judge, files, data, judge_data, method, window, prompts)


def check_inputs(recipe: Recipe) -> None:
    """Find out what of a recipe's inputs is missing or cannot be read.

    Raises:
        UserError: Names the first such input.
    """
    for check in INPUTS:
        check(Launch(recipe))
