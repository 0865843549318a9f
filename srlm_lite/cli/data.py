"""`srlm-lite data`: seed data from what others have published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srlm_lite.cli.completion import overrides, recipe_names
from srlm_lite.telling import for_terminal, json_for_terminal

app = typer.Typer(help="Make the seed data of a run.", no_args_is_help=True)

EVERY_LANGUAGE = "any"


@app.callback()
def _group() -> None:
    """Make the seed data of a run."""


@app.command("prepare")
def prepare_command(
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="A file, a directory of files, what `save_to_disk` wrote, or a dataset's Hub id: "
            "shared out between all parts."
        ),
    ] = None,
    ift: Annotated[
        str | None, typer.Option(help="The same, for ift.jsonl alone: the best reply of each.")
    ] = None,
    ranked: Annotated[
        str | None,
        typer.Option(help="The same, for EFT; without --ift a share of it goes to IFT."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="The same, for prompts.jsonl. Default: the prompts of the others that neither "
            "IFT nor EFT uses, then those of IFT."
        ),
    ] = None,
    eval: Annotated[
        str | None,
        typer.Option(
            help="The same, to be held out: replies in an order for eft_eval.jsonl, prompts or "
            "answers for eval_prompts.jsonl."
        ),
    ] = None,
    format: Annotated[
        Literal["auto", "oasst-trees", "ranked", "ift", "prompts"],
        typer.Option(help="What --source holds; auto looks at its columns."),
    ] = "auto",
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
    input_column: Annotated[
        str | None, typer.Option(help="Column of what the prompt is about; it goes below it.")
    ] = None,
    system_column: Annotated[str | None, typer.Option(help="Column of the system message.")] = None,
    response_column: Annotated[
        str | None, typer.Option(help="Column of the reply, or of a list of them.")
    ] = None,
    chosen_column: Annotated[
        str | None, typer.Option(help="Column of the better reply of a pair.")
    ] = None,
    rejected_column: Annotated[
        str | None, typer.Option(help="Column of the worse reply of a pair.")
    ] = None,
    better_column: Annotated[
        str | None,
        typer.Option(
            help="Column that says which of two replies is better, or whether one is good."
        ),
    ] = None,
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
    ignore_column: Annotated[
        list[str] | None,
        typer.Option(help="A column that need not be used; may be given several times."),
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
        str,
        typer.Option(
            "--split", help="Of a dataset with several splits; 'train+validation' joins two."
        ),
    ] = "train",
    hub_config: Annotated[
        str | None, typer.Option("--config", help="Configuration of a Hub dataset.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the data in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """Make IFT, EFT and prompts for a run from what there is.

    Reads JSON, JSON Lines, CSV, TSV, Parquet and Arrow, also compressed, and
    datasets: pairs, replies with scores or ranks, instructions, dialogues,
    Open Assistant trees, prompt lists. Says which columns it takes for what,
    how many rows it kept and dropped and why; the same account is saved as
    prepare.json. What would lose a reply, a score, an input or a system
    message without a word is refused.
    """
    import sys

    from srlm_lite.data.columns import Columns
    from srlm_lite.data.prepare import Options, prepare

    options = Options(
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
            system=system_column,
            input=input_column,
            chosen=chosen_column,
            rejected=rejected_column,
            better=better_column,
        ),
        given_scores=given_scores,
        score_range=score_range,
        target_range=target_range,
        min_prompt_chars=min_prompt_chars,
        max_prompt_chars=max_prompt_chars,
        ift=ift,
        ranked=ranked,
        eval=eval,
        hub_config=hub_config,
        ignore=tuple(ignore_column or ()),
    )
    if sys.stderr.isatty():
        from srlm_lite.cli.progress import ConsoleReporter

        with ConsoleReporter() as reporter:
            facts = prepare(source, out, options, force=force, reporter=reporter)
    else:
        facts = prepare(source, out, options, force=force)
    from srlm_lite.cli.wrapping import columns, fitted, hung, of_stderr

    for note in facts["notes"]:
        typer.echo(hung("note: ", for_terminal(note), of_stderr()), err=True)
    if as_json:
        typer.echo(json_for_terminal(facts, indent=2))
    else:
        typer.echo(fitted(for_terminal(_account(facts, out)), columns()))
    typer.echo(_next(facts, out), err=as_json)


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

    sources = facts["sources"]
    if len(sources) == 1:
        lines = [f"{facts['source']} ({facts['format']}) -> {out}"]
    else:
        lines = [f"{len(sources)} sources -> {out}"]
        lines += [f"  {one['for']:<8}{one['source']} ({one['shape']})" for one in sources]
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


def _next(facts: dict[str, Any], out: Path) -> str:
    """What to do with it: look at it, then name it to a run."""
    from srlm_lite.errors import program

    given = f"--set data.dir={out}"
    if "ift.jsonl" not in facts["files"]:
        given = f"--set prompts.file={out / 'prompts.jsonl'}"
    return (
        f"next: {program()} data show {out}\nthen: {program()} iterate {given} --adapters out/mine"
    )
