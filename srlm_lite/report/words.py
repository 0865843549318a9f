"""What a method's figures are: by no means every method orders its pairs by a judge's score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from srlm_lite.pairing import JUDGE


@dataclass(frozen=True, slots=True)
class Words:
    """How to speak of a run of one method."""

    score: str | None = "score"
    """The figure of either reply of a pair; None where it only tells the two apart."""
    why_no_votes: str | None = None
    """Where no judge grades the candidates: who or what does instead."""
    why_no_pairs: str | None = None
    """Where nothing is learned from pairs: from what else."""
    judgement: str = "score"
    """What a judgement of a candidate gives."""
    candidates: str = "candidates"
    """What stands where the policy's answers do."""
    judging: str = "judging"
    """What takes the time between candidates and pairs."""
    training: str = "DPO"
    """What trains a delta."""
    own_accuracy: str = "on own candidates, by gold"
    """Whose pairwise accuracy by gold a run of the method measures on candidates."""
    external: bool = False
    """Whether a server judges, the same for all models."""

    def as_judge(self, model: str) -> str:
        """Who judged when a model was evaluated."""
        return f"the judge, at {model}" if self.external else f"{model} as judge"

    def score_of(self, origin: str) -> str | None:
        """The figure of a pair's replies, by where the pair is from."""
        return "rating by the meta-judge" if origin == JUDGE else self.score


_BY_METHOD = {
    "dpo": Words("minus human rank", "humans have ranked the replies", candidates="human replies"),
    "spin": Words(None, "a human's answer counts as better than the model's"),
    "rlaif": Words(
        "probability of being better",
        "the anchor labels them by written principles",
        judging="revisions and labels",
        training="SFT, then DPO",
        own_accuracy="the anchor's labels, by gold",
    ),
    "rlhf": Words(
        why_no_pairs="the policy learns from the rewards of its own answers",
        judgement="reward",
        judging="reward model",
        training="RLOO",
        own_accuracy="reward model on the policy's answers, by gold",
    ),
}


def words(settings: Mapping[str, Any]) -> Words:
    """The words for a run with these settings, a recipe as `run.json` has it."""
    method = settings.get("method", "self-rewarding")
    if method == "cream" and (settings.get("cream") or {}).get("scores") != "judge":
        found = Words("log-likelihood above the base's", "their likelihood ranks them")
    else:
        found = _BY_METHOD.get(str(method), Words())
    engine = (settings.get("judge") or {}).get("engine")
    engine = engine or (settings.get("rollout") or {}).get("engine")
    found = replace(found, external=engine == "openai")
    if found.score == "score" and (settings.get("pairing") or {}).get("source") == "gold":
        return replace(found, score="gold score")
    return found
