"""How a command line names models and judges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from srlm_lite.compare.comparison import CompareJudge, Judging, Model
from srlm_lite.compare.models import RunModel, digest_of, read_replies
from srlm_lite.engines import SERVER, kind_of
from srlm_lite.errors import UserError
from srlm_lite.export.source import find_source
from srlm_lite.progress import Reporter
from srlm_lite.recipe import Recipe, overridden
from srlm_lite.run.files import read_json
from srlm_lite.run.run import RunDir
from srlm_lite.session import Session
from srlm_lite.settings import OpenAI

SETTINGS = ("compare", "evaluate", "judge", "mt_bench", "openai", "rollout", "vllm")
"""Sections that say how to sample and judge; the others say what the model is."""

NAMED_SERVER = re.compile(r"openai:(?P<model>.+?)@(?P<url>https?://.+)")


class Models:
    """The models within reach of a run, one session for each run directory.

    Args:
        overrides: Settings of `SETTINGS`, for all runs named.
    """

    def __init__(self, directory: Path, overrides: Sequence[str], reporter: Reporter) -> None:
        for override in overrides:
            if override.partition("=")[0].partition(".")[0].strip() not in SETTINGS:
                raise UserError(
                    "is settled by the run",
                    where=f"--set {override}",
                    way_out=f"Set something of {', '.join(SETTINGS)}",
                )
        self._directory, self._overrides, self._reporter = directory, overrides, reporter
        self._sessions: dict[Path, Session] = {}
        self.session = self._session(find_source(directory, "anchor").recipe, directory)

    def find(self, word: str) -> Model:
        """`base`, `anchor`, `last`, a number, `DIR:` and one of these, or a file of replies.

        Raises:
            UserError: There is nothing of that name, or the model is not finished.
        """
        if word in ("base", "anchor", "last") or word.isdecimal():
            return self._of_run(self._directory, word, word)
        directory, colon, which = word.rpartition(":")
        if colon and Path(directory).is_dir():
            return self._of_run(Path(directory), which, f"{Path(directory).resolve().name} {which}")
        if Path(word).is_file():
            return read_replies(Path(word))
        raise UserError(
            "is no model of the run and no file of replies",
            where=word,
            way_out="Say base, anchor, last, the number of an iteration, DIR:T, or a JSONL file; a "
            "judge may be openai:MODEL@URL",
        )

    def run_model(self, word: str) -> RunModel:
        """The same, without files."""
        found = self.find(word)
        if not isinstance(found, RunModel):
            raise UserError("is a file of replies, where a model is needed", where=word)
        return found

    def judge(self, word: str, judging: Judging | None) -> CompareJudge:
        """`self`, another model as in `find`, or `openai:MODEL@URL`.

        Args:
            judging: Default: a server pairwise, a stack as its recipe says.
        """
        if word.startswith("openai:"):
            session = self.server(word)
            return self._by_server(session, judging or "pairwise")
        model = self.run_model("last" if word == "self" else word)
        recipe = model.session.recipe
        if kind_of(recipe, "judge").remote:
            return self._by_server(model.session, judging or "pairwise")
        return CompareJudge(
            model.name, model.digest, model.session, model, judging or recipe.compare.judging
        )

    def server(self, word: str) -> Session:
        """A session whose judge is the server that the word names.

        Raises:
            UserError: Not of the form `openai:MODEL@URL`.
        """
        found = NAMED_SERVER.fullmatch(word)
        if found is None:
            raise UserError(
                "is no server",
                where=word,
                way_out="Say openai:MODEL@URL, such as openai:gpt-5@https://api.openai.com/v1; "
                "the key is read from the environment",
            )
        recipe = self.session.recipe
        settings = recipe.openai.model_copy(update=found.groupdict())
        judge = recipe.judge.model_copy(update={"engine": SERVER})
        changed = recipe.model_copy(update={"openai": settings, "judge": judge})
        return Session(changed, self.session.run, self._reporter)

    @staticmethod
    def _by_server(session: Session, judging: Judging) -> CompareJudge:
        settings: OpenAI = session.recipe.openai
        name = str(settings.model)
        return CompareJudge(name, digest_of(settings.url, name), session, None, judging)

    def _of_run(self, directory: Path, which: str, name: str) -> RunModel:
        source = find_source(directory, "anchor" if which == "base" else which)
        session = self._session(source.recipe, directory)
        run = source.run
        base = read_json(run.base_json) if run.base_json.is_file() else {}
        weights = {key: base.get(key) for key in ("sha256", "revision")}
        iteration = None if which == "base" else source.iteration
        hashes = () if iteration is None else source.hashes
        digest = digest_of(weights, run.facts()["digest"], iteration, hashes)
        return RunModel(_name(name, source.iteration), digest, session, iteration)

    def _session(self, recipe: Recipe, directory: Path) -> Session:
        key = directory.resolve()
        if key not in self._sessions:
            raw = recipe.model_dump(mode="json")
            changed = overridden(raw, self._overrides, where=str(directory))
            self._sessions[key] = Session(changed, RunDir(directory), self._reporter)
        return self._sessions[key]


def _name(word: str, iteration: int) -> str:
    """The word, with the iteration's number for `last` and before a bare number."""
    *before, which = word.split(" ")
    if which == "last":
        which = str(iteration) if iteration else "anchor"
    if which.isdecimal():
        which = f"iteration {int(which)}"
    return " ".join([*before, which])
