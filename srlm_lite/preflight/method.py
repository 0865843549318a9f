"""What a method asks of its recipe before a run begins."""

from __future__ import annotations

from pathlib import Path

from srlm_lite.methods import method_of
from srlm_lite.recipe import Recipe
from srlm_lite.stages.seed_data import FilesOfRecipe


def check_method(recipe: Recipe) -> None:
    """The templates, principles and files that only the recipe's method reads.

    Raises:
        UserError: Names the first that cannot be read.
    """
    method_of(recipe).preflight(FilesOfRecipe(recipe))


def prompts_of_method(recipe: Recipe) -> tuple[list[str], Path] | None:
    """The texts that the iterations take their prompts from, and their file.

    None where the anchor writes them.

    Raises:
        UserError: The file cannot be read.
    """
    pool = method_of(recipe).pool(FilesOfRecipe(recipe))
    return None if pool is None else ([prompt.text for prompt in pool[0]], pool[1])
