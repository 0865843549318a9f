"""The preference pairs of an iteration: what is kept of those that a method has made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from srlm_lite.errors import TooFewPairs
from srlm_lite.evaluate.candidates import pair_facts
from srlm_lite.judging import votes_by_candidate
from srlm_lite.methods import method_of
from srlm_lite.pairing import (
    Drops,
    Regraded,
    accumulated,
    as_newest_judge_has_it,
    flipped,
    is_of_judgements,
    replay_age,
    replayed,
    weighted_by_gap,
)
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.files import read_records, write_json, write_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.seeds import derive_seed
from srlm_lite.session import Session
from srlm_lite.stages.prompts import in_another_directory
from srlm_lite.stages.replies import learned_ids

if TYPE_CHECKING:
    from srlm_lite.training.dpo import PairExample

Grade = Callable[[Sequence[Prompt], Sequence[Candidate]], Sequence[Judgement]]
"""Asks the newest judge for its votes on answers to these prompts."""

ADVICE: Mapping[str, str] = {
    "tied": "raise judge.votes or rollout.n, or train a finer judge",
    "narrow": "lower pairing.min_gap",
    "not_widest": "raise checklist.keep",
    "truncated": "raise rollout.max_new_tokens",
    "unreadable": "raise judge.max_new_tokens, or give the anchor more judge data",
    "too_long_to_judge": "raise base.window, or lower rollout.max_new_tokens or "
    "judge.max_new_tokens: what is sampled has to fit the judge's question",
    "too_few_votes": "raise judge.max_new_tokens or judge.votes",
    "no_parting": "raise rollout.n or rollout.temperature, or set steps.pairs=answers",
    "duplicate": "raise rollout.temperature",
    "empty": "check the chat template and the anchor",
    "too_long": "raise base.window or lower rollout.max_new_tokens",
}
"""What to do about the main reason why prompts gave no pair; a method adds its own."""


def keep_pairs(
    session: Session,
    iteration: IterationDir,
    made: Sequence[PreferencePair],
    drops: Drops,
    *,
    advice: Mapping[str, str],
    grade: Grade,
    origin: str = "",
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """The method's preference pairs that fit the window, and older ones to learn once more.

    Args:
        advice: For reasons of the method's own.
        grade: Asked of older pairs where the recipe has it.
        origin: Of the pairs that the iteration is about, and that `drops` tells of.

    Raises:
        TooFewPairs: Fewer new ones than `pairing.min_pairs`; says why prompts gave none.
    """
    recipe = session.recipe
    fitting = fitting_pairs(session, made)
    own = [pair for pair in fitting if not pair.origin]
    if recipe.pairing.weight == "gap":
        own = weighted_by_gap(own)
    if recipe.pairing.source == "flipped":
        own = [flipped(pair) for pair in own]
    fitting = [*own, *(pair for pair in fitting if pair.origin)]
    main = [pair for pair in fitting if pair.origin == origin]
    drops.prompts["too_long"] += sum(pair.origin == origin for pair in made) - len(main)
    write_json(iteration.drops, drops.to_json())
    if len(main) < recipe.pairing.min_pairs:
        raise _too_few(session, len(main), drops, iteration, {**ADVICE, **advice})
    replays, told = older_pairs(session, iteration, grade, new=len(own))
    write_records(iteration.pairs, [*fitting, *replays])
    return [*fitting, *replays], {
        "pairs": len(own),
        **({"judge_pairs": len(fitting) - len(own)} if len(fitting) > len(own) else {}),
        **({"replayed": len(replays)} if replays else {}),
        **told,
        "drops": {reason: count for reason, count in drops.prompts.items() if count},
        **(pair_facts(recipe.evaluate.gold, own) if own else {}),
    }


def older_pairs(
    session: Session, iteration: IterationDir, grade: Grade, *, new: int
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Pairs of earlier iterations to learn once more, as the newest judge has them, and facts.

    Args:
        new: How many new pairs there are, which `pairing.replay` has shares of.
    """
    recipe, method = session.recipe, method_of(session.recipe)
    if not method.has_older_pairs:
        return [], {}
    before = range(iteration.number - 1, 0, -1)
    shares = recipe.pairing.replay
    older = [
        read_records(session.run.iteration(t).pairs, PreferencePair)
        for t in (before if method.accumulates else before[: len(shares)])
    ]
    if method.accumulates:
        found = accumulated(older)
    else:
        seed = derive_seed(recipe.seed, iteration.number, "replay")
        found = replayed(older, new=new, shares=shares, seed=seed)
    order = recipe.pairing.older_order
    if order == "keep" or not found:
        return found, {}
    of_answers = [one for one in found if not is_of_judgements(one.origin)]
    kept, disputed = as_newest_judge_has_it(_regraded(iteration, of_answers, grade), order)
    kept += [one for one in found if is_of_judgements(one.origin)]
    return kept, {"older": len(found), "disputed": disputed}


def _regraded(
    iteration: IterationDir, pairs: Sequence[PreferencePair], grade: Grade
) -> list[Regraded]:
    """Older pairs with the newest votes on their replies, which go by names of their own: two
    iterations may have answered one prompt."""
    prompts: dict[str, Prompt] = {}
    candidates: dict[str, Candidate] = {}
    named: list[tuple[PreferencePair, str, str]] = []
    for one in pairs:
        prompts.setdefault(one.prompt_id, Prompt(one.prompt_id, one.prompt, "", one.messages))
        made_in = iteration.number - replay_age(one)
        chosen, rejected = f"{made_in}/{one.chosen_id}", f"{made_in}/{one.rejected_id}"
        for name, text in ((chosen, one.chosen), (rejected, one.rejected)):
            candidates.setdefault(name, Candidate(one.prompt_id, name, text, 0, "stop"))
        named.append((one, chosen, rejected))
    votes = votes_by_candidate(grade(list(prompts.values()), list(candidates.values())))
    return [
        Regraded(one, votes.get(chosen, ()), votes.get(rejected, ()))
        for one, chosen, rejected in named
    ]


def keep_none(iteration: IterationDir) -> tuple[list[PreferencePair], dict[str, Any]]:
    """That an iteration makes no pairs, for whoever reads the run."""
    write_json(iteration.drops, Drops().to_json())
    write_records(iteration.pairs, [])
    return [], {"pairs": 0, "drops": {}}


def fitting_pairs(session: Session, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs whose two sequences both fit the window."""
    window = session.recipe.base.window
    return [pair for pair in pairs if len(pair_example(session, pair)) <= window]


def pair_example(session: Session, pair: PreferencePair) -> PairExample:
    """A preference pair as ids."""
    from srlm_lite.training.dpo import PairExample

    chat = session.chat
    of_judge = is_of_judgements(pair.origin)  # its prompt is a question to the judge
    return PairExample(
        prompt_ids=tuple(chat.prompt_ids(pair.prompt) if of_judge else chat.policy_ids(pair)),
        chosen_ids=learned_ids(chat, pair.chosen, pair.chosen_ids),
        rejected_ids=learned_ids(chat, pair.rejected, pair.rejected_ids),
        weight=pair.weight,
        smoothing=pair.smoothing,
    )


def _too_few(
    session: Session, count: int, drops: Drops, iteration: IterationDir, advice: dict[str, str]
) -> TooFewPairs:
    needed = session.recipe.pairing.min_pairs
    if session.thought_tokens():
        advice["truncated"] += " or rollout.max_thought_tokens"
    main = next((reason for reason, found in drops.prompts.most_common(1) if found), "")
    go_on = f"Go on with them by pairing.min_pairs={count}. " if count else ""
    return TooFewPairs(
        f"iteration {iteration.number} has {count} preference pairs, fewer than "
        f"pairing.min_pairs = {needed}; prompts without one: {drops.summary() or 'none'}",
        where=str(iteration.path),
        way_out=f"{go_on}To have more, {advice.get(main, 'give more prompts')}; more prompts "
        f"help always (prompts.per_iteration){in_another_directory(session)}",
    )
