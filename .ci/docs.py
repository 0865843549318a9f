"""Writes the pages of docs/ that say what the code says; `make docs` calls it before the site.

python .ci/docs.py            writes them
python .ci/docs.py --check    writes nothing; exits with 1 where one would change
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "srlm_lite"
WRITTEN = "<!-- Written by `make docs`; do not edit. -->"
BEGIN = "<!-- parts: written by `make docs`, do not edit: begin -->"
END = "<!-- parts: end -->"

COMMANDS = f"""# Commands

{WRITTEN}

Data goes to stdout, progress to stderr. Exit code 0 is success, 2 a mistake that you can put right,
said in one line, and 1 anything else. `--set` may be given several times.

- `-v` before the command logs what is done: `srlm-lite -v iterate ...`.
- `srlm-lite --version` prints the version.
- `srlm-lite --install-completion` lets your shell complete commands, options, names of recipes and
  keys of settings, from the next shell on; `--show-completion` prints what it would install.

"""


SETTINGS = f"""# Settings

{WRITTEN}

A recipe is a YAML file: what a run is to do. It has the sections below, and names at least `name`,
`base.name` and `data.dir`; everything else has a default.

```yaml
extends: llama3.1-8b      # a shipped recipe or a path; what follows goes on top of it
name: mine
data: {{dir: my-data}}
dpo:
  beta: 0.2
```

- `srlm-lite recipes list` names the shipped recipes, `srlm-lite recipes show NAME` prints one with
  its comments to copy, and `srlm-lite recipes check my.yaml` says whether yours is valid, with all
  defaults filled in.
- On the command line `--set dpo.beta=0.2` overrides a setting of any recipe; the value is YAML, so
  a list is `--set 'tracking.report_to=[tensorboard, wandb]'`.
- Relative paths in a recipe start at its own directory, or else at the working directory, or else
  at that of the shipped recipes, so a copy of one of those runs; those in `--set` at the working
  directory.
- `srlm-lite recipes new mine.yaml --from NAME` begins one: what it extends, and every setting of
  that as a comment to change.
- `srlm-lite recipes explain dpo.beta` says in a terminal what this page says of it, and with
  `--recipe NAME` what that recipe has there and which file says so.
- What a method does not read is refused, rather than passed over.
- A run goes on only with settings that compute the same. Those marked *may change* are no part of
  that: a run that is begun goes on with other values.
- A setting that came after your run was begun does not change it: the run goes on as it was.

In an editor with a YAML language server (VS Code's YAML extension, and others), a schema completes
keys, shows their meaning and marks mistakes while you type:

```
srlm-lite recipes schema --out recipe.schema.json
```

and on top of the recipe:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```

## Sections

"""


def main() -> int:
    """Write the pages, or say which would change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = [name for name, write in PAGES.items() if (DOCS / name).read_text() != write()]
    for name in changed:
        print(f"docs/{name}: {'would change' if check else 'written'}", file=sys.stderr)
        if not check:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return 1 if check and changed else 0


def settings_page() -> str:
    """Every setting with what it takes, its default and its meaning, from the recipe's fields."""
    from srlm_lite.explain import settings_in

    top = settings_in()
    sections = [one for one in top if one.section is not None]
    rows = [(f"[`{one.key}`](#{one.key})", _cell(_prose(one.meaning))) for one in sections]
    own = "".join(_setting(one) for one in top if one.section is None)
    return (
        SETTINGS
        + _table(("section", "what it is for"), rows)
        + f"\n## The recipe itself\n{own}"
        + "".join(f"\n## {one.key}\n\n{one.meaning}\n{_settings_below(one)}" for one in sections)
    )


def _settings_below(section: Any) -> str:
    from srlm_lite.explain import settings_in

    text = ""
    for one in settings_in(section.section, above=section):
        text += _setting(one)
        if one.section is not None:
            text += _settings_below(one)
    return text


def _setting(one: Any) -> str:
    if one.section is not None:
        return f"\n### {one.key}\n\n{one.meaning}\n"
    facts = [one.takes, "has to be given" if one.default is None else f"default `{one.default}`"]
    if not one.decides:
        facts.append("*may change*")
    if one.before is not None:
        facts.append(f"a run begun before it existed keeps `{one.before}`")
    for method, values in one.refused.items():
        what = f"refuses {', '.join(f'`{value}`' for value in values)}" if values else "reads none"
        facts.append(f"`{method}` {what}")
    said = "; ".join(facts)
    return f"\n### {one.key}\n\n{said[0].upper()}{said[1:]}.\n\n{_prose(one.meaning)}\n"


def commands_page() -> str:
    """Every command with its arguments and options, from the typer app."""
    from typer.main import get_command

    from srlm_lite.cli.main import app

    commands = dict(_commands(get_command(app), ()))
    text = COMMANDS + _table(
        ("command", "what it does"),
        [
            (f"[`{name}`](#{name.replace(' ', '-')})", _first(command.help))
            for name, command in commands.items()
        ],
    )
    return text + "".join(_command(name, command) for name, command in commands.items())


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


def _command(name: str, command: Any) -> str:
    context = command.make_context(f"srlm-lite {name}", [], resilient_parsing=True)
    parameters = [one for one in command.params if not one.hidden]
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    words = [one.get_help_record(context)[0].split(" ")[0] for one in arguments]
    paragraphs = "\n\n".join(_whole(part) for part in command.help.split("\n\n"))
    rows = []
    for one in parameters:
        said, meaning = one.get_help_record(context)
        rows.append((f"`{_cell(said)}`", _cell(_prose(_whole(meaning)))))
    usage = " ".join(
        ["srlm-lite", name, *words, *(["[OPTIONS]"] if len(rows) > len(words) else [])]
    )
    text = f"\n## {name}\n\n```\n{usage}\n```\n\n{paragraphs}\n"
    return text + (f"\n{_table(('option', 'meaning'), rows)}" if rows else "")


def bases_page() -> str:
    """What is written from the table of the tests' families."""
    return str(_from_file(ROOT / "tests" / "families.py").page())


def architecture_page() -> str:
    """The page with its table of parts as the package and the tests' layers have it."""
    return _with_parts("architecture.md", _parts())


def judges_page() -> str:
    """The page with its tables of forms of judging and of the layouts of preference files."""
    from srlm_lite.data.preferences import formats_table
    from srlm_lite.forms import forms_table

    return _with_parts("judges.md", f"{forms_table()}\n", formats_table())


def methods_page() -> str:
    """The page with its table of methods as they declare themselves."""
    from srlm_lite.methods import table

    return _with_parts("methods.md", f"{table()}\n")


def data_page() -> str:
    """The page with the shapes of tables and the names of columns that are found."""
    from srlm_lite.data.shapes import names_table, table

    return _with_parts("data.md", f"{table()}\n{names_table()}")


def readme() -> str:
    """The README with the same table."""
    from srlm_lite.methods import table

    return _with_parts("../README.md", f"{table()}\n")


def _with_parts(name: str, *parts: str) -> str:
    """A page that is written by hand, but for some parts, in their order."""
    page, *rest = (DOCS / name).read_text(encoding="utf-8").split(BEGIN)
    for part, text in zip(parts, rest, strict=True):
        _, after = text.split(END)
        page += f"{BEGIN}\n\n{part}\n{END}{after}"
    return page


def _parts() -> str:
    layers: dict[str, set[str]] = _from_file(ROOT / "tests" / "test_layering.py").ALLOWED
    rows = []
    for part in _from_the_bottom(layers):
        place = PACKAGE / part.replace(".", "/")
        file = place.with_suffix(".py")
        file = file if file.is_file() else place / "__init__.py"
        said = _first(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
        link = f"[`{part}`](../{file.relative_to(ROOT).as_posix()})"
        rows.append((link, _cell(_prose(said)), ", ".join(sorted(layers[part])) or "no other"))
    return _table(("part", "what it is", "may import"), rows)


def _from_the_bottom(layers: dict[str, set[str]]) -> list[str]:
    """Each part after all that it may import."""
    ordered: list[str] = []
    while len(ordered) < len(layers):
        free = [one for one in layers if one not in ordered and layers[one] <= set(ordered)]
        if not free:
            raise ValueError("the layers have a circle")
        ordered += sorted(free)
    return ordered


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _first(text: str) -> str:
    """The first paragraph of a docstring in one line."""
    return _whole(text.split("\n\n")[0])


def _whole(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """A text for a table: a bar would end its cell."""
    return text.replace("|", "\\|")


def _prose(text: str) -> str:
    """A text that may hold `<words>`, which a page would take for marks of its own."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(one if one.startswith("`") else one.replace("<", "&lt;") for one in parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "bases.md": bases_page,
    "architecture.md": architecture_page,
    "judges.md": judges_page,
    "methods.md": methods_page,
    "data.md": data_page,
    "../README.md": readme,
}
"""The pages by file name, and what writes them."""


if __name__ == "__main__":
    sys.exit(main())
