"""`srlm-lite`: the commands, and what their errors look like."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from srlm_lite.cli import bench, data, recipes, show
from srlm_lite.cli.completion import overrides, recipe_names
from srlm_lite.cli.usage import UsageError, as_told
from srlm_lite.cli.wrapping import after_name
from srlm_lite.errors import SrlmError, UserError, same_command
from srlm_lite.processes import place, say
from srlm_lite.stopping import exit_code, terminable, told
from srlm_lite.telling import Discreet, for_terminal, without_secrets

IN_MANY_PROCESSES = ("iterate", "evaluate")
"""Commands that share their work out when a launcher starts them several times."""


class Commands(TyperGroup):
    """The commands, and what their interruption looks like: typer itself would end in silence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo(err=True)
            say(told(stop))
            raise SystemExit(exit_code(stop)) from None


app = typer.Typer(
    name="srlm-lite",
    cls=Commands,
    help="Self-Rewarding Language Models on one machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.add_typer(show.app, name="show")


Adapters = Annotated[Path, typer.Option("--adapters", help="The run directory.", metavar="DIR")]


@app.command()
def iterate(
    adapters: Adapters,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Shipped name or path; default: of the run in DIR, else by the hardware.",
            autocompletion=recipe_names,
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Overrides the recipe's number; 0 makes the anchor only.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a setting: dpo.beta=0.2",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over. The run in DIR goes once the new one has begun."),
    ] = False,
    no_plan: Annotated[
        bool, typer.Option("--no-plan", help="Start even if the plan says it cannot fit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask all that can fail, and write nothing.")
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print the answers as JSON.")
    ] = False,
) -> None:
    """Run the loop: anchor, then iterations of answering, judging, pairing and DPO.

    Goes on where it was when DIR holds a run of the same recipe.
    """
    from srlm_lite.cli import iterate as command

    overrides = [*(set_ or []), *([] if iterations is None else [f"iterations={iterations}"])]
    wish = command.Wish(recipe, adapters, overrides, fresh, planned=not no_plan)
    if dry_run:
        command.dry_run(wish, as_json=json_)
    elif json_:
        raise UserError("goes with --dry-run", where="--json")
    else:
        command.run_iterate(wish)


@app.command()
def plan(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Shipped name or path; without it, chosen by the hardware.",
            autocompletion=recipe_names,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a setting: dpo.beta=0.2",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="Other hardware than this machine's: 8xH100, 2x80GB, 24GB.", metavar="NxGPU"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What a recipe will need: memory by phase and part, disk, tokens, time; no weights loaded.

    Says what to change where a phase does not fit, and what more GPUs or another way to sample
    would bring. A time is measured, scaled from what was measured elsewhere, or unknown.
    """
    from srlm_lite.cli.plan import run_plan

    run_plan(recipe_name=recipe, overrides=set_ or [], gpus=gpus, as_json=json_)


@app.command()
def evaluate(
    adapters: Adapters,
    iteration: Annotated[
        str, typer.Option(help="Number of an iteration, `anchor`, `base`, or `last`.")
    ] = "last",
    data_dir: Annotated[
        Path | None,
        typer.Option("--data", help="Another data directory with eft_eval.jsonl.", metavar="DIR"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Measure otherwise: evaluate.eft_prompts=200",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print eval.json.")] = False,
) -> None:
    """Measure one model of a run as judge and as policy.

    What the run has measured is shown at once. With --data or --set the result goes to a folder
    of its own below `eval_on/`.
    """
    from srlm_lite.cli.evaluate import run_evaluate

    run_evaluate(
        directory=adapters,
        which=iteration,
        data_dir=data_dir,
        overrides=set_ or [],
        as_json=json_,
    )


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="A",
            help="base, anchor, last, an iteration's number, DIR:T of another run, or a JSONL "
            "file of replies.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Argument(metavar="B", help="What A is compared with.", show_default=False)
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters", help="The run directory.", metavar="DIR", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompt list, JSONL; default: the run's held-out ones.", metavar="FILE"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first N prompts.", metavar="N", min=1)
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="self (the last model of the run), another model as for A, or openai:MODEL@URL; "
            "its key is read from the environment."
        ),
    ] = "self",
    judging: Annotated[
        Literal["pointwise", "pairwise"] | None,
        typer.Option(
            help="By scores of each reply alone, or by showing both. Default: a server pairwise, "
            "a stack as its recipe says (compare.judging).",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Other than in the recipe: compare.temperature=0.3",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="In place of models: comparisons in AlpacaEval's format, JSON or JSON lines.",
            metavar="FILE",
        ),
    ] = None,
    difficulty: Annotated[
        Path | None,
        typer.Option(
            help="With --annotations: AlpacaEval's instruction_difficulty.csv or df_gamed.csv, "
            "for its full length-controlled win rate.",
            metavar="FILE",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Two models head to head: wins, ties, losses of A, and its length-controlled win rate.

    What was answered and judged is kept in DIR; a stopped comparison goes on.
    """
    from srlm_lite.cli.compare import ComparisonWish, run_annotations, run_compare

    if annotations is not None:
        if model is not None:
            raise UserError("takes no models beside it", where="--annotations")
        run_annotations(path=annotations, difficulty=difficulty, as_json=json_)
        return
    if model is None or baseline is None or adapters is None:
        raise UserError(
            "needs two models and their run, or a file of annotations",
            where="compare",
            way_out="Say --adapters DIR A B, such as --adapters out/demo 2 anchor, or "
            "--annotations FILE",
        )
    if difficulty is not None:
        raise UserError("goes with --annotations", where="--difficulty")
    wish = ComparisonWish(
        directory=adapters,
        model=model,
        baseline=baseline,
        prompts=prompts,
        limit=limit,
        judge=judge,
        judging=judging,
        overrides=set_ or [],
    )
    run_compare(wish, as_json=json_)


@app.command("mt-bench")
def mt_bench(
    adapters: Adapters,
    questions: Annotated[
        Path, typer.Option(help="JSONL in MT-Bench's format: question.jsonl.", metavar="FILE")
    ],
    judge: Annotated[
        str, typer.Option(help="openai:MODEL@URL; its key is read from the environment.")
    ],
    iteration: Annotated[
        str, typer.Option(help="Number of an iteration, `anchor`, `base`, or `last`.")
    ] = "last",
    references: Annotated[
        Path | None,
        typer.Option(
            help="Reference answers, JSONL; used for math, coding, reasoning.", metavar="FILE"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first N questions.", metavar="N", min=1)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Other than in the recipe: openai.parallel=2",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """MT-Bench: two turns a question, each answer graded from 1 to 10 by an external judge.

    What was answered and graded is kept in DIR; a stopped one goes on.
    """
    from srlm_lite.cli.mt_bench import MtBenchWish, run_command

    wish = MtBenchWish(
        directory=adapters,
        model=iteration,
        questions=questions,
        references=references,
        limit=limit,
        judge=judge,
        overrides=set_ or [],
    )
    run_command(wish, as_json=json_)


@app.command()
def export(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="Directory to write.", metavar="DIR")],
    iteration: Annotated[str, typer.Option(help="Number, `anchor`, or `last`.")] = "last",
    as_: Annotated[
        Literal["merged", "adapter", "gguf"],
        typer.Option(
            "--as",
            help="Full weights for transformers and vLLM, the stack as one LoRA, or one file for "
            "llama.cpp and Ollama.",
        ),
    ] = "merged",
    onto: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option(
            help="Base to merge onto: its original weights (default), or what NF4 or a GGUF file "
            "makes of them, against which the adapters were trained."
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the weights; `auto`: the base's own, an adapter's float32."),
    ] = "auto",
    quantize: Annotated[
        Literal["f16", "bf16", "q8_0", "q4_k_m"] | None,
        typer.Option(
            help="Type of the weights with `--as gguf`; default: the base's 16 bits. q4_k_m needs "
            "llama.cpp's llama-quantize."
        ),
    ] = None,
    base_id: Annotated[
        str | None,
        typer.Option(
            help="With `--as adapter`: where others find the base, if the run had it from a "
            "directory or a GGUF file.",
            metavar="ORG/NAME[@REVISION]",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload it, to a private repository.", metavar="ORG/NAME")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be written and uploaded.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print parity.json.")] = False,
) -> None:
    """Write a model of a run as weights of its own, checked against the stack.

    It gets its name only when it answers as the stack does. A stopped export goes on.
    """
    from srlm_lite.cli.export import run_export
    from srlm_lite.export.export import ExportWish

    run_export(
        directory=adapters,
        which=iteration,
        wish=ExportWish(
            out=out.absolute(),
            form=as_,
            onto=onto,
            dtype=dtype,
            quantize=quantize,
            base_id=base_id,
        ),
        push_to=push_to_hub,
        public=public,
        dry_run=dry_run,
        as_json=json_,
    )


@app.command()
def chat(
    adapters: Adapters,
    iteration: Annotated[
        str, typer.Option(help="Number of an iteration, `anchor`, `base`, or `last`.")
    ] = "last",
    temperature: Annotated[
        float | None, typer.Option(help="Default: the recipe's; 0 is greedy.")
    ] = None,
) -> None:
    """Talk to any model of a run, on the base in memory; /help lists the commands.

    Reads lines from stdin, so it works in a pipe; answers go to stdout.
    """
    from srlm_lite.cli.chat import run_chat

    run_chat(directory=adapters, which=iteration, temperature=temperature)


@app.command()
def serve(
    adapters: Adapters,
    iteration: Annotated[
        str | None,
        typer.Option(
            help="Serve this model alone: a number, `anchor`, `base`, or `last`. Default: all.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Ask each request for this key. Default: the environment's SRLM_API_KEY; without "
            "one, none is asked for.",
            metavar="KEY",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve the models of a run to OpenAI's clients, all of them on the one base in memory.

    The name of a model is `base`, `anchor` or the number of its iteration. Ctrl-C ends it.
    """
    from srlm_lite.cli.serve import ServeWish, run_serve

    run_serve(ServeWish(adapters, iteration, host, port, api_key))


@app.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Look at this recipe alone, as iterate does before it starts.",
            autocompletion=recipe_names,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="With --recipe, override a setting.",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
) -> None:
    """Whether this machine is ready, and for which recipes: versions, GPU, memory, disk, a proof.

    Exit code 1 where srlm-lite is of no use like this, 2 where a recipe that is named cannot start.
    """
    if set_ and recipe is None:
        raise UserError("goes with --recipe", where="--set")
    from srlm_lite.cli.doctor import run_doctor

    run_doctor(as_json=json_, recipe_name=recipe, overrides=set_ or [])


@app.command()
def report(
    adapters: Adapters,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: report.html in DIR.", metavar="FILE.html"),
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another run to hold it against, such as one with pairing.source=random from the "
            "same anchor; may be repeated.",
            metavar="DIR",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a summary for a model card instead.")
    ] = False,
) -> None:
    """Write one HTML file about a run: did it improve, charts, the recipe, all pairs.

    It needs no network. A run that is still going is shown as far as it is.
    """
    from srlm_lite.cli.report import run_report

    run_report(directory=adapters, out=out, as_markdown=markdown, controls=control or ())


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
) -> None:
    """Self-Rewarding Language Models on one machine."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, handlers=[_log_to_stderr()]
    )
    if not verbose:
        # It warns of a faster kernel for CPUs that a user of a CPU cannot install.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if place().world > 1 and context.invoked_subcommand not in IN_MANY_PROCESSES:
        raise UserError(
            f"{context.invoked_subcommand or 'srlm-lite'} runs in one process",
            way_out="Start it without accelerate or torchrun",
        )
    if version:
        from srlm_lite import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


REFUSALS = {
    errno.ENOSPC: "Free some space; {same} goes on from here",
    errno.EDQUOT: "Free some space; {same} goes on from here",
    errno.EACCES: "Allow it, or choose another place",
    errno.EPERM: "Allow it, or choose another place",
    errno.EROFS: "Choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Choose another place",
}
"""What a file system may say no with that is no fault of the program, and the way out."""


def refused_by_the_disk(error: Exception) -> UserError | None:
    """What a file system refused, as a user's error; None where it is something else.

    safetensors writes by itself, and tells the number in its text alone.
    """
    number, where = getattr(error, "errno", None), getattr(error, "filename", None)
    told = re.search(r"\(os error (\d+)\)", str(error))
    if number is None and told:
        number = int(told[1])
    if number not in REFUSALS:
        return None
    return UserError(
        os.strerror(number),
        where=None if where is None else str(where),
        way_out=REFUSALS[number].format(same=same_command()),
    )


def _log_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Discreet("%(name)s: %(message)s"))
    return handler


def _tell_of_a_fault(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A traceback, which may quote a key or a model's words."""
    told = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(for_terminal(without_secrets(told)))


def _tell_of_a_thread_s_fault(fault: threading.ExceptHookArgs) -> None:
    """The same of a thread that ends with an error, as those of a server can."""
    if fault.exc_value is not None:
        _tell_of_a_fault(fault.exc_type, fault.exc_value, fault.exc_traceback)


def _stand_somewhere() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError(
            "the working directory has been deleted", way_out="Change to another"
        ) from error


def run() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    # Fork-based tokenizer workers warn, datasets draws bars of its own, and transformers advises.
    sys.excepthook = _tell_of_a_fault
    threading.excepthook = _tell_of_a_thread_s_fault
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        _stand_somewhere()
        code = app(standalone_mode=False)
    except UsageError as wrong:
        told_of = as_told(wrong)
        if told_of is not None:
            say(after_name(str(told_of)))
        raise SystemExit(2) from None
    except UserError as error:
        say(after_name(str(error)))
        raise SystemExit(2) from None
    except SrlmError as error:
        say(after_name(f"stopped: {error}"))
        raise SystemExit(1) from None
    except Exception as error:
        refused = refused_by_the_disk(error)
        if refused is None:
            raise
        say(after_name(str(refused)))
        raise SystemExit(2) from None
    raise SystemExit(code or 0)
