"""Lets the site hold what its pages link to outside docs/; mkdocs calls it.

Texts of the repository become pages beside those of docs/. Other files that a page links to go into
the site as they are, below files/. So a link is the same in the repository and here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    "README.md": "readme.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/accelerate/README.md": "gpus.md",
}
"""Texts outside docs/, and the page that a link to them leads to."""
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the texts and the files that pages link to."""
    for name, page in TEXTS.items():
        if page not in files.src_uris:
            text = _relinked((ROOT / name).read_text(encoding="utf-8"), posixpath.dirname(name))
            files.append(File.generated(config, page, content=text))
    for file in _linked():
        if not file.startswith("docs/") and file not in TEXTS:
            files.append(File.generated(config, f"files/{file}", abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page in docs/ to where their files are in the site."""
    generated = page.file.generated_by is not None
    return markdown if generated else _relinked(markdown, "docs")


def _linked() -> set[str]:
    """Files of the repository that a page links to."""
    folders = {"docs": list((ROOT / "docs").glob("*.md"))}
    for name in TEXTS:
        folders.setdefault(posixpath.dirname(name), []).append(ROOT / name)
    return {
        _in_the_repository(link, folder)
        for folder, texts in folders.items()
        for text in texts
        for _, link in LINK.findall(text.read_text(encoding="utf-8"))
    }


def _relinked(text: str, folder: str) -> str:
    return LINK.sub(lambda found: found[1] + _in_the_site(found[2], folder), text)


def _in_the_repository(link: str, folder: str) -> str:
    return posixpath.normpath(posixpath.join(folder, link))


def _in_the_site(link: str, folder: str) -> str:
    file = _in_the_repository(link, folder)
    if file in TEXTS:
        return TEXTS[file]
    return file.removeprefix("docs/") if file.startswith("docs/") else f"files/{file}"
