"""DNO, direct Nash optimisation, in its practical form: all pairs with a clear winner.

The policy's candidates, and where there is one a stronger teacher's answer, are graded. A winner
needs a high score, and a margin over the loser: a wider one for the teacher's answer, so that the
policy's own good answers count. Every pair that qualifies is learned, with pairs of earlier
iterations beside them (`pairing.replay: [0.3, 0.15]`). An answer that repeats itself loses to any.

Source: Rosset et al. 2024, arXiv:2404.03715, section 4: K = 5, winners of 5 or 6 on a scale of 6,
margins of 2 and 1, at most 30% of the last iteration's pairs and 15% of the one's before. Its
annotator is GPT-4-Turbo, which grades side by side; here it is the judge of the recipe, so for
the paper's setting it is `judge.engine: openai` with `dno.grading: side-by-side`. The printed
learning rate (5e-5) looks odd and is not taken over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.judging import SCORES, fill, load_question, numbered, plain_lines
from srlm_lite.methods.self_rewarding import MadePairs, SelfRewarding, judged
from srlm_lite.pairing import Drops, Scored, has_tag, length_penalty, pair
from srlm_lite.records import Candidate, Judgement, PreferencePair, Prompt
from srlm_lite.run.files import read_jsonl, write_records
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.settings import Dno as Section
from srlm_lite.stages import iteration as stages
from srlm_lite.stages.replies import read_as_reply
from srlm_lite.stages.sampling import ask, limits_of

TEACHER = "teacher-"
"""What marks the names of the teacher's answers."""

BEST_SIDE_BY_SIDE = 6
"""The scale of the side-by-side judge ends here; it begins at 0."""

_SCORE = re.compile(r"score (\d+): (\d+(?:\.\d+)?)", re.IGNORECASE)
WRITTEN = (*SCORES, numbered("score"))
"""Lines that the side-by-side judge writes, for `quote`."""


def margin_pairs(
    prompts: Sequence[Prompt],
    usable: Mapping[str, Sequence[Scored]],
    drops: Drops,
    section: Section,
    *,
    min_gap: float = 0.0,
    alpha: float = 0.0,
) -> list[PreferencePair]:
    """Every pair whose winner scores high enough, with the margin that its author asks for.

    An answer that repeats itself cannot win, and loses to every winner. Prompts without a pair
    are counted in `drops` as `no_margin`.

    Args:
        min_gap: The scores of a pair that wins by its margin differ by more than this, too.
        alpha: What a character more costs the winner of its margin, in score points.
    """
    pairs = []
    for prompt in (prompt for prompt in prompts if prompt.prompt_id in usable):
        found = []
        for winner, loser in permutations(usable[prompt.prompt_id], 2):
            of_teacher = has_tag(winner[0].candidate_id, TEACHER)
            margin = section.margin if of_teacher else section.own_margin
            gap = winner[1] - loser[1]
            longer = len(winner[0].text) - len(loser[0].text)
            wide = gap > min_gap and gap - alpha * longer >= margin
            if winner[1] < section.least_positive or repeats(winner[0].text, section):
                continue
            if wide or repeats(loser[0].text, section):
                found.append(pair(prompt, winner, loser))
        drops.prompts["no_margin"] += not found
        pairs += found
    return pairs


def repeats(text: str, section: Section) -> bool:
    """Whether a run of `repeated_words` words occurs three times, overlapping ones included."""
    words, n = text.lower().split(), section.repeated_words
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return max(runs.values(), default=0) >= 3


def read_scores(reply: str, n: int) -> list[float | None]:
    """The scores that a side-by-side reply gives to replies 1 to n.

    Each is a line of its own, `Score <i>: <number>`; of several for one reply the last counts,
    and a number off the scale is none.
    """
    scores: list[float | None] = [None] * n
    for line in plain_lines(reply):
        match = _SCORE.fullmatch(line)
        if match and 1 <= int(match[1]) <= n:
            score = float(match[2])
            scores[int(match[1]) - 1] = score if score <= BEST_SIDE_BY_SIDE else None
    return scores


def render(template: str, prompt: str, replies: Sequence[str]) -> str:
    """The side-by-side judge's question."""
    texts = {f"reply{i}": text for i, text in enumerate(replies, start=1)}
    places = (f"<reply {i}>\n{{{{reply{i}}}}}\n</reply {i}>" for i in range(1, len(replies) + 1))
    whole = template.replace("{{responses}}", "\n".join(places))
    return fill(whole, {"prompt": prompt, **texts}, WRITTEN)


class Dno(SelfRewarding):
    """More candidates, another way to grade them, more pairs."""

    def candidates(
        self, session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
    ) -> tuple[list[Candidate], dict[str, Any]]:
        """The policy's, then the teacher's."""
        own, facts = stages.candidates(session, iteration, prompts)
        teacher = _teacher(session, iteration, prompts)
        return [*own, *teacher], {**facts, **({"teacher": len(teacher)} if teacher else {})}

    def judgements(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> tuple[list[Judgement], dict[str, Any]]:
        """One by one, or side by side."""
        if session.recipe.dno.grading == "rubric":
            return stages.judgements(session, iteration, prompts, candidates)
        rows = _side_by_side(session, iteration, prompts, candidates)
        write_records(iteration.judgements, rows)
        readable = [row.score for row in rows if row.score is not None]
        return rows, {
            "judgements": len(rows),
            "parse_rate": round(len(readable) / max(1, len(rows)), 4),
            "mean_score": round(sum(readable) / len(readable), 3) if readable else None,
        }

    def make_pairs(
        self,
        session: Session,
        iteration: IterationDir,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """Every pair that qualifies."""
        usable, drops = judged(session, prompts, candidates, judgements)
        pairing = session.recipe.pairing
        alpha = length_penalty(list(usable.values()), pairing)
        pairs = margin_pairs(
            prompts, usable, drops, session.recipe.dno, min_gap=pairing.min_gap, alpha=alpha
        )
        return pairs, drops, {"alpha": round(alpha, 6)} if pairing.alpha == "auto" else {}


def _teacher(
    session: Session, iteration: IterationDir, prompts: Sequence[Prompt]
) -> list[Candidate]:
    teacher = session.recipe.dno.teacher
    if teacher is None:
        return []
    if teacher == "server":
        of = stages.Answerer([], iteration.teacher_candidates, "teacher", TEACHER, "teacher")
        return stages.candidates(session, iteration, prompts, n=1, of=of)[0]
    rows = [read_as_reply(session.chat, row) for row in teacher_answers(Path(teacher), prompts)]
    write_records(iteration.teacher_candidates, rows)
    return rows


def teacher_answers(path: Path, prompts: Sequence[Prompt]) -> list[Candidate]:
    """The answers that a file has to these prompts.

    Raises:
        UserError: A row lacks a key, or no row is for any of the prompts.
    """
    wanted = {prompt.prompt_id for prompt in prompts}
    rows: list[Candidate] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        named, text = row.get("prompt_id"), row.get("response")
        if named is None or not isinstance(text, str):
            raise UserError(f"row {number} lacks prompt_id or response", where=str(path))
        prompt_id = str(named)  # a number in some files, as in prompt lists
        if prompt_id in wanted:
            name = f"{prompt_id}#{TEACHER}{number}"
            rows.append(Candidate(prompt_id, name, text, len(text.split()), "stop"))
    if not rows:
        raise UserError(
            f"answers none of the iteration's {len(prompts)} prompts",
            where=str(path),
            way_out="Its prompt_id have to be those of the prompt list",
        )
    return rows


def _side_by_side(
    session: Session,
    iteration: IterationDir,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
) -> list[Judgement]:
    recipe = session.recipe
    template = load_question("side-by-side", recipe.dno.template)
    texts = {prompt.prompt_id: prompt.text for prompt in prompts}
    groups: dict[str, list[Candidate]] = {}
    for row in candidates:
        if row.text and not (recipe.pairing.drop_truncated and row.finish_reason == "length"):
            groups.setdefault(row.prompt_id, []).append(row)
    orders = {
        (prompt_id, vote): Random(f"{recipe.seed}/{iteration.number}/{prompt_id}/{vote}").sample(
            group, len(group)
        )
        for prompt_id, group in groups.items()
        for vote in range(recipe.judge.votes)
    }
    replies = ask(
        session,
        session.stack(iteration.number - 1),
        [
            (f"{prompt_id}:{vote}", render(template, texts[prompt_id], [row.text for row in order]))
            for (prompt_id, vote), order in orders.items()
        ],
        path=iteration.replies,
        stage="side by side",
        limits=limits_of(recipe.judge),
        seed_path=(recipe.seed, iteration.number, "side by side"),
    )
    found = []
    for (prompt_id, vote), order in orders.items():
        reply = replies[f"{prompt_id}:{vote}"]
        scores = read_scores(reply.text if reply.finish_reason == "stop" else "", len(order))
        for row, score in zip(order, scores, strict=True):
            found.append(Judgement(row.candidate_id, vote, reply.text, score, reply.finish_reason))
    return found
