"""The files that come with the package: recipes, and what recipes name by a word."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from srlm_lite.errors import UserError


class Shelf(NamedTuple):
    """Shipped files of one kind: their folder among the recipes, and the ending of their names."""

    folder: str
    suffix: str

    def place(self, name: str) -> Path:
        """Where the file of this name is, if it is shipped."""
        return recipes_dir() / self.folder / f"{name}{self.suffix}"


RUBRICS = Shelf("rubrics", ".yaml")
TEMPLATES = Shelf("templates", ".txt")
CHAT_TEMPLATES = Shelf("chat_templates", ".jinja")
PRINCIPLES = Shelf("principles", ".yaml")


def recipes_dir() -> Path:
    """The directory of the shipped recipes: inside an installed package, or of a checkout."""
    packaged = Path(str(resources.files("srlm_lite"))) / "recipes"
    return packaged if packaged.is_dir() else packaged.parent.parent / "recipes"


def shipped_text(shelf: Shelf, *, name: str) -> str:
    """What such a file says.

    Raises:
        UserError: As `shipped_file`; or it is not UTF-8 text.
    """
    path = shipped_file(shelf, name=name)
    try:
        return path.read_text(encoding="utf-8-sig")  # files from Windows may begin with a mark
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=str(path)) from error


def shipped_file(shelf: Shelf, *, name: str) -> Path:
    """A file of one kind, such as a rubric, given by shipped name or by path.

    Raises:
        UserError: There is neither.
    """
    shipped = shelf.place(name)
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    folder, suffix = shelf
    names = sorted(path.stem for path in (recipes_dir() / folder).glob(f"*{suffix}"))
    raise UserError(
        f"neither a file nor one of the shipped {folder} ({', '.join(names)})", where=name
    )


def place_of_base(name: str) -> str:
    """A base by its place among the recipes, where it is shipped with them; else as it is named.

    The recipes need not be this installation's.
    """
    folders = Path(name).parts
    if "recipes" in folders:
        last = len(folders) - 1 - folders[::-1].index("recipes")
        inside = Path(*folders[last + 1 :])
        if inside.parts and (recipes_dir() / inside).is_dir():
            return f"recipes/{inside.as_posix()}"
    return name


def short_base(name: str) -> str:
    """A base's name without the folders around it."""
    place = place_of_base(name)
    return place.removeprefix("recipes/") if place != name else name.rstrip("/").rsplit("/", 1)[-1]
