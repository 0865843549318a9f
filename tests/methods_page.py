"""Writes the table of methods into `docs/methods.md`: `python tests/methods_page.py`."""

from __future__ import annotations

import re
from pathlib import Path

from srlm_lite.methods import table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
MARKS = re.compile(r"(<!-- table of methods: .*? -->\n).*?(<!-- end of the table -->)", re.DOTALL)


def with_table(text: str) -> str:
    """The page with the table as the methods declare it now."""
    return MARKS.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
