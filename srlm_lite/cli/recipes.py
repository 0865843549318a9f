"""`srlm-lite recipes`: list, show, check."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="The shipped recipes, and checks of one's own.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Names and what they are for."""
    import shutil
    import sys
    import textwrap

    from srlm_lite.recipe import load_recipe, shipped_recipes

    names = shipped_recipes()
    width = max(len(name) for name in names)
    # A terminal is wrapped for; a program gets a line for each.
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    for name in names:
        line = f"{name:<{width}}  {load_recipe(name).description}"
        indent = " " * (width + 2)
        typer.echo(textwrap.fill(line, max(columns, width + 20), subsequent_indent=indent))


@app.command()
def show(name: Annotated[str, typer.Argument(help="Shipped name or path.")]) -> None:
    """The recipe's file, comments and all."""
    from srlm_lite.recipe import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8").rstrip())


@app.command()
def check(name: Annotated[str, typer.Argument(help="Shipped name or path.")]) -> None:
    """Whether a recipe is valid, and what it says with all defaults filled in."""
    import yaml

    from srlm_lite.recipe import load_recipe

    recipe = load_recipe(name)
    typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip())
