"""`srlm-lite recipes`: list, show, new, check, explain, schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from srlm_lite.cli.completion import recipe_names, setting_keys

if TYPE_CHECKING:
    from srlm_lite.explain import Setting

app = typer.Typer(
    help="The shipped recipes, checks of one's own, and what settings mean.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="Shipped name or path.", autocompletion=recipe_names)]


@app.command("list")
def list_() -> None:
    """Names and what they are for."""
    from srlm_lite.cli.wrapping import columns, hung
    from srlm_lite.recipe import load_recipe, shipped_recipes

    names = shipped_recipes()
    width = max(len(name) for name in names)
    for name in names:
        typer.echo(hung(f"{name:<{width}}  ", load_recipe(name).description, columns()))


@app.command()
def show(name: Name) -> None:
    """The recipe's file, comments and all."""
    from srlm_lite.recipe import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8").rstrip())


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="PATH")],
    from_: Annotated[
        str,
        typer.Option(
            "--from", help="The shipped recipe to begin with.", autocompletion=recipe_names
        ),
    ],
) -> None:
    """A recipe of one's own: a shipped one, with its settings there to change."""
    import shlex

    from srlm_lite.errors import UserError, program
    from srlm_lite.recipe import begun_from

    text = begun_from(from_, called=file.stem)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise UserError("is there already", where=str(file), way_out="Name another one") from error
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(file)) from error
    typer.echo(f"next: {program()} recipes check {shlex.quote(str(file))}", err=True)


@app.command()
def check(name: Name) -> None:
    """Whether a recipe is valid, what it says with all defaults filled in, and what it lacks here.

    The recipe goes to stdout; whether its files are there, and a verdict, to stderr. Exit code 2
    where it is not valid, or a file that a run needs is missing or cannot be read.
    """
    import yaml

    from srlm_lite.cli.preflight import preflight_text
    from srlm_lite.cli.wrapping import fitted, of_stderr
    from srlm_lite.preflight.checks import Answer, answers_of_files
    from srlm_lite.preflight.launch import Launch
    from srlm_lite.recipe import load_recipe

    recipe = load_recipe(name)
    typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip())
    found = [*answers_of_files(Launch(recipe)), Answer("base", *_base(recipe.base.name))]
    width = of_stderr()
    typer.echo("\n" + preflight_text(found, width=width), err=True)
    missing = [one.check for one in found if one.state == "bad"]
    verdict = (
        f"is valid, but a run would stop: see {', '.join(missing)}"
        if missing
        else "is valid, and its files are there; `iterate --dry-run` asks the base and the machine"
    )
    typer.echo(fitted(f"{name}: {verdict}", width), err=True)
    raise typer.Exit(2 if missing else 0)


def _base(name: str) -> tuple[Literal["ok", "bad", "not asked"], str]:
    """Whether a base is there, as far as that shows without loading what could read it."""
    if Path(name).exists():
        return "ok", name
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf"):
        return "bad", f"base.name: there is nothing at {name}"
    return "not asked", f"{name}, by name: of a package or the Hub"


@app.command()
def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A setting such as dpo.beta, or a section such as dpo; without it, all sections.",
            autocompletion=setting_keys,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Say what this recipe has there, and which file says so.",
            autocompletion=recipe_names,
        ),
    ] = None,
) -> None:
    """What a setting means, what it takes, who reads it, and whether a run may change it."""
    from srlm_lite.explain import find_setting, settings_in

    if key is None:
        _list(settings_in(), recipe)
        return
    found = find_setting(key)
    if found.section is not None:
        _say(found.meaning)
        _list(settings_in(found.section, above=found), recipe)
        return
    typer.echo(found.key)
    for line in filter(None, (found.meaning, *_facts(found))):
        _say(line, indent="  ")
    if recipe is not None:
        _say(_said_by(found, recipe), indent="  ")


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: stdout.", metavar="FILE")
    ] = None,
) -> None:
    """The JSON schema of recipes: editors complete and check by it.

    In an editor with a YAML language server, put this on top of a recipe:
    # yaml-language-server: $schema=FILE
    """
    import json

    from srlm_lite.errors import UserError
    from srlm_lite.explain import schema

    text = json.dumps(schema(), indent=2, ensure_ascii=False)
    if out is None:
        typer.echo(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(out)) from error


def _facts(setting: Setting) -> list[str]:
    """What is to be said of a setting beside its meaning, a line each."""
    default = setting.default
    lines = [
        f"takes: {setting.takes}",
        "default: has to be given" if default is None else f"default: {default}",
    ]
    if (readers := _readers(setting)) is not None:
        lines.append(f"read by: {readers}")
    lines += [
        f"method {method} refuses: {', '.join(values)}"
        for method, values in setting.refused.items()
        if values
    ]
    lines.append(
        "in a run that is begun: fixed; another value is another run"
        if setting.decides
        else "in a run that is begun: may change"
    )
    if setting.before is not None:
        lines.append(f"a run begun before it existed keeps: {setting.before}")
    return lines


def _readers(setting: Setting) -> str | None:
    """Which methods read it; None where no method is told apart."""
    if setting.read_by is not None:
        return f"{setting.read_by} alone"
    without = [method for method, values in setting.refused.items() if not values]
    return f"every method but {', '.join(without)}" if without else None


def _said_by(setting: Setting, recipe: str) -> str:
    from srlm_lite.explain import value_in, written

    value, file = value_in(setting.key, recipe)
    return f"in {recipe}: {written(value)} ({'the default' if file is None else f'by {file}'})"


def _list(settings: list[Setting], recipe: str | None) -> None:
    width = max(len(one.key) for one in settings)
    for one in settings:
        shown = ""
        if one.section is None:
            if recipe is not None:
                shown = _said_by(one, recipe).partition(": ")[2] + ". "
            elif one.default is not None:
                shown = f"{one.default}. "
        first = one.meaning.split(". ")[0].rstrip(".")
        _say(f"{one.key:<{width}}  {shown}{first}", indent="", hanging=" " * (width + 2))


def _say(text: str, *, indent: str = "", hanging: str | None = None) -> None:
    """A line, wrapped for a terminal; a program gets it whole."""
    import textwrap

    from srlm_lite.cli.wrapping import columns

    hanging = indent if hanging is None else hanging
    typer.echo(
        textwrap.fill(
            text,
            max(columns() or 10**6, len(hanging) + 20),
            initial_indent=indent,
            subsequent_indent=hanging,
            break_on_hyphens=False,
        )
    )
