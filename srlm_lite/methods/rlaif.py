"""RLAIF, or Constitutional AI: the model is held to written principles, and nobody ranks replies.

Iteration 1 is the supervised phase. The model answers, criticises its answer in the light of a
principle, revises it, and again with a fresh principle; SFT on the revisions of all rounds is the
delta. From iteration 2 on come preferences. Two answers to a prompt are shown with one principle,
drawn anew for each comparison, and the label is the probability of the one option against the
other, from their log-probabilities in both orders. It stays soft: with p for the chosen answer the
loss is p L(w, l) + (1 - p) L(l, w). After a rationale p is held within 0.4 and 0.6.

The labeller is frozen: critiques, revisions and labels come from the anchor's stack, never from
what the run has learned.

Source: Bai et al. 2022, arXiv:2212.08073, known to us from summaries alone: 16 principles, four
rounds, soft labels, the clamp. Unconfirmed in detail, and different here: the paper fine-tunes the
pretrained model, we train a delta on the anchor, so that the labeller stays in memory; it trains a
preference model on the labels and then does RL, we put them into DPO; the principles are our own.
As there, helpful answers can be learned beside the revisions (`rlaif.helpful`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from srlm_lite.evaluate.candidates import NO_VOTES, candidate_facts, gold_scores
from srlm_lite.judging import plain_lines
from srlm_lite.methods.base import (
    TAUGHT_MORE,
    Case,
    Draws,
    Facts,
    Iteration,
    MadePairs,
    Phase,
    SeedData,
    Sizes,
    Source,
    Trains,
    Words,
)
from srlm_lite.methods.self_rewarding import SelfRewarding
from srlm_lite.pairing import Drops, Scored, pair, usable_candidates
from srlm_lite.principles import Principles, load_principles
from srlm_lite.records import (
    Candidate,
    Judgement,
    Label,
    Likelihood,
    PreferencePair,
    Prompt,
    Reply,
    Revision,
    SampledInstruction,
)
from srlm_lite.settings import IsPath, Optim, Positive, Section
from srlm_lite.shipped import PRINCIPLES

SUPERVISED = 1
"""The iteration that learns from revisions."""


class RevisionSft(Optim):
    """SFT on revisions."""

    section = "rlaif.sft"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class RlaifSettings(Section):
    """Method `rlaif`: critique and revision, then preferences, both by principles."""

    principles: Annotated[str, IsPath(shipped=PRINCIPLES)] = "assistant"
    """Name of shipped principles or a path: the principles and the questions about them."""
    drafts: Positive = 1
    """Answers to each prompt of the first iteration that are revised."""
    rounds: Positive = 4
    """Times a draft is criticised and revised, each time in the light of a fresh principle."""
    helpful: Annotated[float, Field(ge=0)] = 0.0
    """Rows of `ift.jsonl` that are learned beside the revisions, so many for each of them."""
    max_new_tokens: Positive = 256
    """Longest critique, or rationale before a label."""
    rationale: bool = False
    """The labeller gives its reasons before it names the better answer."""
    clamp: Annotated[float, Field(gt=0.5, le=1)] = 0.6
    """Labels after a rationale stay between 1 - clamp and clamp: such labels are overconfident."""
    sft: RevisionSft = RevisionSft()


@dataclass(frozen=True, slots=True)
class ComparedAnswers:
    """Two answers to a prompt, and the principle that they are compared by."""

    prompt: Prompt
    first: Candidate
    second: Candidate
    principle: str

    @property
    def shown(self) -> tuple[tuple[str, Candidate, Candidate], ...]:
        """Both orders, each with its name."""
        a, b = self.first, self.second
        ids = a.candidate_id, b.candidate_id
        return (f"{ids[0]}>{ids[1]}", a, b), (f"{ids[1]}>{ids[0]}", b, a)


def option_probability(first: float, second: float) -> float:
    """How likely the first option is against the second: their log-probabilities, normalised."""
    gap = first - second
    return 1 / (1 + math.exp(-gap)) if gap > -500 else 0.0


def soft_label(shown_first: float, shown_second: float, *, clamp: float = 1.0) -> float:
    """How likely an answer is the better one: the mean of both orders, held within the clamp.

    Args:
        shown_first: Probability of its option where it was shown first.
        shown_second: And where it was shown second.
    """
    return min(max((shown_first + shown_second) / 2, 1 - clamp), clamp)


def fresh_principles(names: Sequence[str], rounds: int, rng: Random) -> list[str]:
    """One principle a round, none twice before all have been drawn."""
    drawn: list[str] = []
    while len(drawn) < rounds:
        drawn += rng.sample(list(names), len(names))
    return drawn[:rounds]


def rationale_of(reply: Reply, options: Sequence[str]) -> str | None:
    """A reply without its verdict, which is the last line if it is an option; None if cut short."""
    if reply.finish_reason == "length":
        return None
    lines = reply.text.splitlines()
    said = plain_lines(lines[-1])[-1:] if lines else []
    verdicts = {line for option in options for line in plain_lines(option)}
    return "\n".join(lines[:-1] if set(said) & verdicts else lines).strip()


def labelled_pairs(
    prompts: Sequence[Prompt],
    candidates: Mapping[str, Candidate],
    labels: Sequence[Label],
    drops: Drops,
    *,
    min_gap: float = 0.0,
) -> list[PreferencePair]:
    """A pair for each label, the likelier answer chosen; `smoothing` is 1 - p.

    A label without a preference gives none. A prompt that has labels but no pair is counted in
    `drops`, as `tied`, `narrow` (no preference exceeds `min_gap`) or `unlabelled`.
    """
    by_prompt: dict[str, list[Label]] = {}
    for row in labels:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    pairs = []
    for prompt in (one for one in prompts if one.prompt_id in by_prompt):
        known = [row for row in by_prompt[prompt.prompt_id] if row.p_first is not None]
        found = []
        for row in known:
            p = row.p_first or 0.0
            two = (candidates[row.first_id], p), (candidates[row.second_id], 1 - p)
            (chosen, high), (rejected, low) = two if p > 0.5 else two[::-1]
            if high - low > min_gap:
                made = pair(prompt, (chosen, high), (rejected, low))
                found.append(_soft(made, low))
        if not found:
            told = any(row.p_first != 0.5 for row in known)
            drops.prompts["narrow" if told else "tied" if known else "unlabelled"] += 1
        pairs += found
    return pairs


_ANCHOR = "anchor of rlaif"
"""What the cases of the bench share."""


class Rlaif(SelfRewarding[RlaifSettings]):
    """Revisions in the first iteration, labels in the others."""

    name = "rlaif"
    sources = (
        Source(
            "Bai et al. 2022",
            "Constitutional AI: Harmlessness from AI Feedback",
            "2212.08073",
            "known from summaries",
        ),
    )
    learns_from = "its own revisions by written principles, then its anchor's soft labels by them"
    remark = "Constitutional AI"
    made_by = (
        "revising its own answers by written principles, then DPO on its anchor's labels by them"
    )
    section = "rlaif"
    Settings = RlaifSettings
    labels = {"principles": "principles", "rounds": "rounds of revision"}
    advice = {"unlabelled": "raise rlaif.max_new_tokens"}
    cases = {
        "rlaif": Case("toy-rlaif", anchor=_ANCHOR, is_long=True, group=TAUGHT_MORE),
        "rlaif, random": Case(
            "toy-rlaif", ("pairing.source=random",), anchor=_ANCHOR, is_long=True, group=TAUGHT_MORE
        ),
    }

    @classmethod
    def words(cls, own: RlaifSettings) -> Words:
        """Labels, and no grades."""
        return Words(
            "probability of being better",
            "the anchor labels them by written principles",
            judging="revisions and labels",
            training="SFT, then DPO",
            own_accuracy="the anchor's labels, by gold",
        )

    def needs(self) -> None:
        """What the revisions taught."""
        if self.recipe.dpo.init != "previous":
            raise ValueError(
                "method rlaif needs dpo.init=previous: what the revisions taught is in the last "
                "delta"
            )

    @classmethod
    def unread(cls, own: RlaifSettings) -> Mapping[str, Collection[Any]]:
        """A label has no length."""
        return {"pairing.rho": (), "pairing.alpha": ()}

    @property
    def judge_makes_pairs(self) -> bool:
        """Never."""
        return False

    @property
    def pairs_samples(self) -> bool:
        """Never."""
        return False

    def phases(self, sizes: Sizes) -> Iterator[Phase]:
        """Drafts, critiques and revisions in the first iteration, then answers and labels."""
        recipe, own, n = self.recipe, self.own, self.recipe.rollout.n
        if not recipe.iterations:
            return
        of_each = recipe.prompts.per_iteration
        later, drafts = (recipe.iterations - 1) * of_each, own.drafts * of_each
        samples = max(own.drafts, n if later else 1)
        yield self.answers(sizes, n=samples, texts=drafts + later * n)
        new, at_once = sizes.reply(own.max_new_tokens), 4 * recipe.rollout.chunk_prompts
        revised = drafts * own.rounds
        yield Draws("critiques", at_once, 1, sizes.room(new), new, revised, "judge")
        yield Draws("revisions", at_once, 1, sizes.room(sizes.answer), sizes.answer, revised)
        labels = n // 2 * later
        if own.rationale and labels:
            yield Draws("rationales", at_once, 1, sizes.room(new), new, 2 * labels, "judge")
        learned = revised * (1 + own.helpful) * own.sft.epochs
        tokens = sizes.window if own.helpful else sizes.own
        yield Trains("revision SFT", "sft", "rlaif.sft", tokens, learned)
        if later:
            yield self.dpo(sizes, prompts=later, pairs=n // 2)

    def preflight(self, data: SeedData) -> None:
        """The principles, and what is learned beside revisions."""
        load_principles(self.own.principles)
        if self.own.helpful:
            data.instructions()

    def candidates(self, it: Iteration, prompts: Sequence[Prompt]) -> tuple[list[Candidate], Facts]:
        """Drafts to revise, then answers to compare."""
        rows = it.answer(prompts, n=self.own.drafts if it.number == SUPERVISED else None)
        return rows, candidate_facts(rows)

    def judgements(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[list[Judgement], Facts]:
        """No grades: rounds of critique and revision, then labels by principles."""
        it.write("judgements", [])
        work = self._revise if it.number == SUPERVISED else self._label
        return [], {**NO_VOTES, **work(it, prompts, candidates)}

    def pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> tuple[list[PreferencePair], Facts]:
        """From the second iteration on."""
        if it.number == SUPERVISED:
            return it.keep_none()
        return super().pairs(it, prompts, candidates, judgements)

    def make_pairs(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
    ) -> MadePairs:
        """One for each label; under `pairing.source` drawn blindly, or as gold has it."""
        recipe = self.recipe
        _, drops = self._usable(prompts, candidates)
        labels = it.read("labels", Label)
        by_id = {row.candidate_id: row for row in candidates}
        if recipe.pairing.source == "random":
            # The labels stay, their answers change places by the toss of a coin.
            rng = Random(f"{recipe.seed}/{it.number}/coins")
            labels = [_turned(row) if rng.random() < 0.5 else row for row in labels]
        elif recipe.pairing.source == "gold":
            gold = gold_scores(recipe.evaluate.gold, prompts, candidates)
            labels = [_by_gold(row, gold) for row in labels]
        pairs = labelled_pairs(prompts, by_id, labels, drops, min_gap=recipe.pairing.min_gap)
        return pairs, drops, {}

    def delta(self, it: Iteration, pairs: Sequence[PreferencePair]) -> tuple[None, Facts]:
        """SFT on the revisions, then DPO on the labels."""
        if it.number != SUPERVISED:
            return None, it.learn(pairs)
        rows = self.to_learn(it)
        helpful = it.data.instructions()[: round(self.own.helpful * len(rows))]
        return None, it.imitate([*rows, *helpful], optim=self.own.sft, about="revision SFT")

    def to_learn(self, it: Iteration) -> list[SampledInstruction]:
        """The revisions of all rounds; for the control, the drafts that they are of, as often."""
        prompts = {row.prompt_id: row for row in it.read("prompts", Prompt)}
        drafts = {row.candidate_id: row for row in it.read("candidates", Candidate)}
        blind = self.recipe.pairing.source == "random"
        learned = []
        for row in it.read("revisions", Revision):
            if row.text is None:
                continue
            text, ids = row.text, row.ids
            if blind:
                text, ids = drafts[row.candidate_id].text, drafts[row.candidate_id].ids
            prompt = prompts[row.prompt_id]
            learned.append(
                SampledInstruction(row.prompt_id, prompt.text, text, prompt.messages, ids)
            )
        return learned

    def _revise(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> Facts:
        """Rounds of critique and revision of every draft, into `revisions`."""
        recipe, own = self.recipe, self.own
        held_to = load_principles(own.principles)
        texts = {prompt.prompt_id: prompt.text for prompt in prompts}
        drafts = [
            row
            for row in candidates
            if row.text and not (recipe.pairing.drop_truncated and row.finish_reason == "length")
        ]
        now = {row.candidate_id: row.text for row in drafts}
        principles = {
            name: fresh_principles(
                list(held_to.principles),
                own.rounds,
                Random(f"{recipe.seed}/{it.number}/principles/{name}"),
            )
            for name in now
        }
        rows: list[Revision] = []
        for number in range(1, own.rounds + 1):
            shown = [
                (row, principles[row.candidate_id][number - 1], now[row.candidate_id])
                for row in drafts
            ]
            critiques = it.ask(
                [
                    (
                        row.candidate_id,
                        held_to.ask("critique", name, prompt=texts[row.prompt_id], response=text),
                    )
                    for row, name, text in shown
                ],
                about=f"critiques, round {number}",
                by=it.anchor,
                max_new_tokens=own.max_new_tokens,
                turn=f"critiques_{number}",
                seeded=("critiques", number),
            )
            heard = [one for one in shown if _whole(critiques[one[0].candidate_id])]
            revised = it.ask(
                [
                    (
                        row.candidate_id,
                        held_to.ask(
                            "revision",
                            name,
                            prompt=texts[row.prompt_id],
                            response=text,
                            critique=critiques[row.candidate_id].text,
                        ),
                    )
                    for row, name, text in heard
                ],
                about=f"revisions, round {number}",
                by=it.anchor,
                turn=f"revisions_{number}",
                seeded=("revisions", number),
                to_learn=True,
            )
            for row, name, _ in shown:
                said = revised.get(row.candidate_id)
                text, ids = None, None
                if said is not None and _whole(said):
                    text, ids = said.text, said.ids
                critique = critiques[row.candidate_id].text
                whose = row.prompt_id, row.candidate_id
                rows.append(Revision(*whose, number, name, critique, text, ids))
                now[row.candidate_id] = text or now[row.candidate_id]
        it.write("revisions", rows)
        return self._revision_facts(texts, drafts, rows)

    def _revision_facts(
        self, texts: Mapping[str, str], drafts: Sequence[Candidate], rows: Sequence[Revision]
    ) -> Facts:
        was = {row.candidate_id: row.text for row in drafts}
        last = dict(was)
        changed = []
        for row in rows:
            if row.text is not None:
                changed.append(row.text != last[row.candidate_id])
                last[row.candidate_id] = row.text
        facts: Facts = {
            "revisions": len(changed),
            "unusable_revisions": len(rows) - len(changed),
            "changed": round(fmean(changed), 4) if changed else None,
        }
        if self.recipe.evaluate.gold is not None and drafts:
            prompt_of = {row.candidate_id: row.prompt_id for row in drafts}
            facts["gold_drafts"], facts["gold_revised"] = (
                round(fmean(self._gold(texts, prompt_of, answers).values()), 4)
                for answers in (was, last)
            )
        return facts

    def _gold(
        self, texts: Mapping[str, str], prompt_of: Mapping[str, str], answers: Mapping[str, str]
    ) -> dict[str, float]:
        """Gold scores of answers, by the name of their draft; measured, never learned from."""
        return gold_scores(
            self.recipe.evaluate.gold,
            [Prompt(name, text) for name, text in texts.items()],
            [Candidate(prompt_of[name], name, text, 0, "stop") for name, text in answers.items()],
        )

    def _label(
        self, it: Iteration, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> Facts:
        """A soft label for every two answers of a prompt that are compared, into `labels`."""
        own = self.own
        held_to = load_principles(own.principles)
        comparisons = list(self._comparisons(it, prompts, candidates, held_to))
        rationales = (
            self._rationales(it, comparisons, held_to)
            if own.rationale
            else {name: "" for one in comparisons for name, _, _ in one.shown}
        )
        likely = self._likelihoods(it, comparisons, held_to, rationales)
        clamp = own.clamp if own.rationale else 1.0
        rows: list[Label] = []
        agreeing: list[bool] = []
        for one in comparisons:
            p_shown = [_shown_first(likely, name) for name, _, _ in one.shown]
            first, second = p_shown
            label = None
            if first is not None and second is not None:
                label = round(soft_label(first, 1 - second, clamp=clamp), 6)
                agreeing.append((first - 0.5) * (0.5 - second) > 0)
            ids = one.first.candidate_id, one.second.candidate_id
            rows.append(Label(one.prompt.prompt_id, *ids, one.principle, label))
        it.write("labels", rows)
        known = [row.p_first for row in rows if row.p_first is not None]
        return {
            "labels": len(known),
            "unlabelled": len(rows) - len(known),
            "mean_confidence": round(fmean(max(p, 1 - p) for p in known), 4) if known else None,
            "orders_agree": round(fmean(agreeing), 4) if agreeing else None,
            **self._label_accuracy(prompts, candidates, rows),
        }

    def _comparisons(
        self,
        it: Iteration,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        held_to: Principles,
    ) -> Iterator[ComparedAnswers]:
        """The usable answers of each prompt two by two, each answer once."""
        usable, _ = self._usable(prompts, candidates)
        for prompt in (one for one in prompts if one.prompt_id in usable):
            answers = [answer for answer, _ in usable[prompt.prompt_id]]
            rng = Random(f"{self.recipe.seed}/{it.number}/labels/{prompt.prompt_id}")
            for first, second in zip(answers[::2], answers[1::2], strict=False):
                yield ComparedAnswers(prompt, first, second, rng.choice(list(held_to.principles)))

    def _usable(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]
    ) -> tuple[dict[str, list[Scored]], Drops]:
        return usable_candidates(
            prompts,
            candidates,
            {row.candidate_id: 0.0 for row in candidates},
            drop_truncated=self.recipe.pairing.drop_truncated,
        )

    def _rationales(
        self, it: Iteration, comparisons: Sequence[ComparedAnswers], held_to: Principles
    ) -> dict[str, str | None]:
        replies = it.ask(
            [
                (name, _question(held_to, "reasoning", one, a, b))
                for one in comparisons
                for name, a, b in one.shown
            ],
            about="rationales",
            by=it.anchor,
            max_new_tokens=self.own.max_new_tokens,
            turn="rationales",
        )
        return {name: rationale_of(reply, held_to.options) for name, reply in replies.items()}

    def _likelihoods(
        self,
        it: Iteration,
        comparisons: Sequence[ComparedAnswers],
        held_to: Principles,
        rationales: Mapping[str, str | None],
    ) -> dict[str, Likelihood]:
        """How likely either option ends the reply; what they have in common cancels out later."""
        question = "reasoning" if self.own.rationale else "comparison"
        questions, replies = [], []
        for one in comparisons:
            for name, a, b in one.shown:
                rationale = rationales[name]
                if rationale is None:
                    continue
                questions.append(Prompt(name, _question(held_to, question, one, a, b)))
                for place, option in enumerate(held_to.options):
                    text = f"{rationale}\n{option}".strip()
                    replies.append(Candidate(name, f"{name}:{place}", text, 0, "stop"))
        return it.likelihoods(questions, replies, by=it.anchor, name="options", questions=True)

    def _label_accuracy(
        self, prompts: Sequence[Prompt], candidates: Sequence[Candidate], labels: Sequence[Label]
    ) -> Facts:
        """Share of labels whose likelier answer gold prefers too, where gold prefers one."""
        if self.recipe.evaluate.gold is None:
            return {}
        gold = gold_scores(self.recipe.evaluate.gold, prompts, candidates)
        credits = []
        for row in labels:
            gap = gold[row.first_id] - gold[row.second_id]
            if gap and row.p_first is not None:
                right = (row.p_first - 0.5) * gap
                credits.append(0.5 if right == 0 else float(right > 0))
        return {"gold_pairwise_accuracy": round(fmean(credits), 4) if credits else None}


def _question(
    held_to: Principles, question: str, one: ComparedAnswers, a: Candidate, b: Candidate
) -> str:
    return held_to.ask(question, one.principle, prompt=one.prompt.text, first=a.text, second=b.text)


def _shown_first(likely: Mapping[str, Likelihood], name: str) -> float | None:
    first, second = (likely.get(f"{name}:{place}") for place in (0, 1))
    if first is None or second is None:
        return None
    return option_probability(first.logp, second.logp)


def _whole(reply: Reply) -> bool:
    return bool(reply.text) and reply.finish_reason == "stop"


def _soft(made: PreferencePair, p_rejected: float) -> PreferencePair:
    return replace(made, smoothing=round(p_rejected, 6))


def _turned(row: Label) -> Label:
    return row if row.p_first is None else replace(row, p_first=1 - row.p_first)


def _by_gold(row: Label, gold: Mapping[str, float]) -> Label:
    gap = gold[row.first_id] - gold[row.second_id]
    return replace(row, p_first=0.5 + 0.5 * ((gap > 0) - (gap < 0)))
