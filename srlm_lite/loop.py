"""Self-Rewarding Language Models, the loop. Read this first.

    base     does it understand its data at all?
  anchor   M1: SFT on instruction data and judge data
    then, for each iteration t:
      prompts      new for every iteration
      candidates   the policy answers each prompt N times
      judgements   the same weights, as judge, grade each answer K times
      pairs        best against worst answer of each prompt
      delta        DPO on the pairs, on top of the anchor
      evaluation   as judge against human order, as policy against a gold scorer

Every stage reads files and writes files; a run that was stopped goes on where it was. What the
stages of an iteration do is the method's affair: `methods/self_rewarding.py` is this paper's, and
the others change what they must.

Source: Yuan et al. 2024, arXiv:2401.10020, section 2.
"""

from __future__ import annotations

import shutil

from srlm_lite.methods import method_of
from srlm_lite.run.layout import IterationDir
from srlm_lite.session import Session
from srlm_lite.stages import anchor, evaluation
from srlm_lite.stages.at_work import AtWork
from srlm_lite.stages.log import StageLog
from srlm_lite.stages.prompts import check_prompts
from srlm_lite.stages.reading import reading


def iterate(session: Session) -> None:
    """Run the recipe's iterations, each on what the one before it has learned."""
    make_anchor(session)
    for t in range(1, session.recipe.iterations + 1):
        make_iteration(session, session.run.iteration(t))
    shutil.rmtree(session.run.scratch, ignore_errors=True)
    session.run.checkpoint.drop()


def make_anchor(session: Session) -> None:
    """M1: the base with its anchor."""
    directory = session.run.anchor
    if directory.is_done:
        return
    check_prompts(session, method_of(session.recipe).pool)
    log = StageLog(session, directory, iteration=0)
    log.run("base", lambda: reading(session))
    session.settle()
    log.run("anchor", lambda: anchor.anchor(session))
    log.run("evaluation", lambda: evaluation.evaluation(session, directory, session.stack(0)))
    log.finish()


def make_iteration(session: Session, directory: IterationDir) -> None:
    """M(t+1), from the answers and grades of M(t)."""
    if directory.is_done:
        return
    t, method, it = directory.number, method_of(session.recipe), AtWork(session, directory)
    evaluation.hold_to_gates(session, t - 1)
    log = StageLog(session, directory, iteration=t)
    prompts = log.run("prompts", lambda: method.prompts(it))
    candidates = log.run("candidates", lambda: method.candidates(it, prompts))
    judgements = log.run("judgements", lambda: method.judgements(it, prompts, candidates))
    pairs = log.run("pairs", lambda: method.pairs(it, prompts, candidates, judgements))
    log.run("delta", lambda: method.delta(it, pairs))
    policy, judge = session.stack(t), session.stack(t, "judge")
    log.run("evaluation", lambda: evaluation.evaluation(session, directory, policy, judge=judge))
    log.finish()
