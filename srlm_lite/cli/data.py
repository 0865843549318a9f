"""`srlm-lite data`: seed data from what others have published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srlm_lite.cli.completion import overrides, recipe_names

app = typer.Typer(help="Make the seed data of a run.", no_args_is_help=True)

EVERY_LANGUAGE = "any"


@app.callback()
def _group() -> None:
    """Make the seed data of a run."""


@app.command("prepare")
def prepare_command(
    source: Annotated[
        str, typer.Option(help="A file (.jsonl or .txt, also .gz) or a dataset's Hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    format: Annotated[
        Literal["auto", "oasst-trees", "ranked", "prompts"],
        typer.Option(help="What the source holds; auto looks at its columns."),
    ] = "auto",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompt list (file or Hub id) for prompts.jsonl. Default: the source's prompts "
            "that neither IFT nor EFT uses, then those of IFT."
        ),
    ] = None,
    lang: Annotated[
        str, typer.Option(help="Keep this language, where rows name one; 'any' keeps all.")
    ] = "en",
    ift_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the prompts with ordered replies that IFT gets."),
    ] = 0.5,
    eval_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the EFT prompts held out for evaluation.")
    ] = 0.25,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the prompt.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column of the reply.")] = None,
    score_column: Annotated[
        str | None, typer.Option(help="Column of the score; higher is better.")
    ] = None,
    rank_column: Annotated[
        str | None, typer.Option(help="Column of the rank; lower is better.")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the reply's id.")] = None,
    prompt_id_column: Annotated[str | None, typer.Option(help="Column of the prompt's id.")] = None,
    target_column: Annotated[
        str | None,
        typer.Option(help="Column of the judge's full reply, which ends in 'Score: <number>'."),
    ] = None,
    given_scores: Annotated[
        bool,
        typer.Option(
            "--given-scores",
            help="Make each EFT target its score, rescaled. Quick; it teaches no rationale.",
        ),
    ] = False,
    score_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LO HI", help="Range of the score column (default: lowest and highest)."
        ),
    ] = None,
    target_range: Annotated[
        tuple[int, int], typer.Option(metavar="LO HI", help="Range of the rubric's score.")
    ] = (0, 5),
    min_prompt_chars: Annotated[
        int, typer.Option(min=1, help="Shortest prompt for prompts.jsonl.")
    ] = 10,
    max_prompt_chars: Annotated[
        int, typer.Option(min=1, help="Longest prompt for prompts.jsonl.")
    ] = 2000,
    hub_split: Annotated[
        str, typer.Option("--split", help="Split of a Hub dataset; 'train+validation' joins two.")
    ] = "train",
    force: Annotated[bool, typer.Option("--force", help="Replace the data in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """Make IFT, EFT and prompts for a run from one source.

    Sources: Open Assistant message trees; replies with a rank or score, one
    a row, or pairs of chosen and rejected; prompt lists. Says how many rows
    it kept and dropped and why; the same account is saved as prepare.json.
    """
    import json

    from srlm_lite.data.columns import Columns
    from srlm_lite.data.prepare import Options, prepare

    facts = prepare(
        source,
        out,
        Options(
            format=format,
            prompts=prompts,
            hub_split=hub_split,
            lang=None if lang == EVERY_LANGUAGE else lang,
            ift_share=ift_share,
            eval_share=eval_share,
            columns=Columns(
                prompt=prompt_column,
                response=response_column,
                score=score_column,
                rank=rank_column,
                id=id_column,
                prompt_id=prompt_id_column,
                target=target_column,
            ),
            given_scores=given_scores,
            score_range=score_range,
            target_range=target_range,
            min_prompt_chars=min_prompt_chars,
            max_prompt_chars=max_prompt_chars,
        ),
        force=force,
    )
    for note in facts["notes"]:
        typer.echo(f"note: {note}", err=True)
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _account(facts, out))


@app.command("show")
def show_command(
    directory: Annotated[
        Path, typer.Argument(help="Directory with ift.jsonl and so on.", metavar="DIR")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Count in the tokens of this base: a name or path.", metavar="NAME"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Count for this recipe: its base, its template, its window.",
            metavar="NAME",
            autocompletion=recipe_names,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="With --recipe or --base, override a setting: base.window=4096",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with charts and samples, too.", metavar="FILE.html"),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Prompts of each file that the page shows.", min=0, max=400)
    ] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Look at seed data before a run uses it: counts, lengths, languages, what stands out.

    For what `data prepare` has written, or files of the same names made by hand. Needs no run, and
    reads files of any size. Says first what a run would refuse, and what a model would learn wrong.
    """
    from srlm_lite.cli.data_show import ShowWish, run_show

    run_show(ShowWish(directory, base, recipe, set_ or [], html, samples), as_json=as_json)


def _account(facts: dict[str, Any], out: Path) -> str:
    """What was kept and dropped, to read."""
    from srlm_lite.data.ledger import REASONS

    lines = [f"{facts['source']} ({facts['format']}) -> {out}"]
    for name, counts in facts["files"].items():
        lines.append(f"  {name:<16}{counts['rows']:>7} rows, {counts['prompts']} prompts")
    for kind in ("replies", "prompts"):
        ledger = facts[kind]
        if not ledger["seen"]:
            continue
        dropped = sum(ledger["dropped"].values())
        lines.append(f"{kind}: {ledger['seen']} seen, {ledger['kept']} kept, {dropped} dropped")
        for reason, count in ledger["dropped"].items():
            lines.append(f"  {count:>7}  {reason}: {REASONS[reason]}")
    return "\n".join(lines)
