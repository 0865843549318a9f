"""Prompt lists: which texts become the prompts of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from srlm_lite.data.columns import reused_id
from srlm_lite.data.ledger import Ledger
from srlm_lite.data.row_store import RowStore, packed, unpacked
from srlm_lite.data.sources import DataSource
from srlm_lite.data.split import hash_order, short
from srlm_lite.data.text import normalised, prompt_problem, words_of
from srlm_lite.records import Prompt


class PromptList:
    """Prompts that a run may be given, each judged by itself, by the others, and by EFT.

    Args:
        ledger: Is told of every prompt.
    """

    def __init__(self, store: RowStore, ledger: Ledger, *, min_chars: int, max_chars: int) -> None:
        self._store, self._ledger = store, ledger
        self._min_chars, self._max_chars = min_chars, max_chars
        self._count = 0
        store.make(
            "TABLE asks (n INTEGER PRIMARY KEY, id TEXT, exact BLOB, same BLOB, words BLOB, "
            "ift INT, by_order BLOB, problem TEXT, body TEXT)"
        )

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Take prompts, in their order."""
        for prompt in prompts:
            self._count += 1
            text = prompt.text
            problem = prompt_problem(text, min_chars=self._min_chars, max_chars=self._max_chars)
            self._store.put(
                "asks",
                self._count,
                prompt.prompt_id,
                short(text),
                short(normalised(text)),
                short(words_of(text)),
                False,
                bytes.fromhex(hash_order(prompt.prompt_id, "order")),
                problem,
                packed(prompt.to_row()),
            )

    def refuse_reused_ids(self, source: DataSource) -> None:
        """That each id stands for one prompt.

        Raises:
            UserError: One stands for two.
        """
        found = self._store.one(
            "SELECT a.n, a.id FROM asks a JOIN (SELECT id, exact, MIN(n) FROM asks GROUP BY id) f "
            "ON f.id = a.id WHERE a.exact <> f.exact ORDER BY a.n LIMIT 1"
        )
        if found is not None:
            raise reused_id(source, *found)

    def decide(self, *, shuffled: bool) -> None:
        """Say which of them a run can use, once the replies are shared out.

        Args:
            shuffled: They are left over from replies: those that IFT does not use come first, in
                an order that does not hang on the source's. Else they keep their order.
        """
        run = self._store.run
        if shuffled:
            run("UPDATE asks SET ift = id IN (SELECT id FROM facts WHERE part = 'ift')")
        eft = "SELECT same FROM facts WHERE part IN ('eft_train', 'eft_eval')"
        held = "SELECT words FROM facts WHERE part IN ('eft_eval', 'eval_prompts')"
        free = "problem IS NULL"
        run(f"UPDATE asks SET problem = 'in_eft' WHERE {free} AND same IN ({eft})")
        run(f"UPDATE asks SET problem = 'held_out' WHERE {free} AND words IN ({held})")
        self._order = "ift, by_order, n" if shuffled else "n"
        later = (
            f"SELECT n FROM (SELECT n, ROW_NUMBER() OVER (PARTITION BY same ORDER BY {self._order})"
            f" AS place FROM asks WHERE {free}) WHERE place > 1"
        )
        run(f"UPDATE asks SET problem = 'duplicate' WHERE n IN ({later})")
        self._ledger.seen += self._count
        for problem, count in run("SELECT problem, COUNT(*) FROM asks GROUP BY problem"):
            if problem is None:
                self._ledger.kept += count
            else:
                self._ledger.drop(problem, count)

    def chosen(self) -> Iterator[Prompt]:
        """The prompts that a run can use."""
        rows = self._store.run(
            f"SELECT body FROM asks WHERE problem IS NULL ORDER BY {self._order}"
        )
        for row in unpacked(rows):
            messages = row.get("messages")
            yield Prompt.from_row(row | ({"messages": tuple(messages)} if messages else {}))
