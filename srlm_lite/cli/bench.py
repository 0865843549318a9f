"""`srlm-lite bench`: what parts of the program cost on this machine, beside other ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srlm_lite.cli.completion import overrides, recipe_names
from srlm_lite.errors import UserError

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")]

NAMES = {
    "ours": "ours",
    "vllm": "vLLM",
    "continuous": "generate_batch, continuous",
    "batched": "generate, batched",
    "one-by-one": "generate, one by one",
}


@app.command()
def rollout(
    base: Annotated[
        str,
        typer.Option(
            help="Hub id, directory, .gguf file, smollm2-135m-instruct, or random:SHAPE: random "
            "weights of a shape that `plan` knows, such as gemma3-270m."
        ),
    ] = "smollm2-135m-instruct",
    prompts: Annotated[int, typer.Option(help="Of the 16 prompts, the first P.", metavar="P")] = 16,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Lengthen each prompt to so many tokens.", metavar="N", min=1),
    ] = None,
    votes: Annotated[int, typer.Option(help="Judgements a candidate.", metavar="K", min=1)] = 3,
    engines: Annotated[
        str,
        typer.Option(
            help="Which ways, separated by commas; there is `continuous`, transformers' "
            "continuous batching, as well.",
            metavar="WAYS",
        ),
    ] = "one-by-one,batched,ours,vllm",
    one_by_one_prompts: Annotated[
        int, typer.Option(help="Measure one by one on M prompts and extrapolate.", min=1)
    ] = 1,
    batch_rows: Annotated[
        int | None, typer.Option(help="Ours: samples in one batch; default: what fits.", min=1)
    ] = None,
    naive_batch_prompts: Annotated[
        int, typer.Option(help="Batched generate: prompts in one batch.", min=1)
    ] = 16,
    json_: Json = False,
) -> None:
    """Sampling: 4 candidates a prompt and K votes on each, by our engines and by plain generate.

    Every sample has its full length, so the work is equal: 96 tokens a candidate, 64 a vote.
    """
    from srlm_lite.bench.rollout import RolloutBench, bench_rollout, ways_of
    from srlm_lite.bench.workload import Workload
    from srlm_lite.cli.progress import ConsoleReporter

    settings = RolloutBench(
        base=base,
        ways=ways_of(engines),
        workload=Workload(prompts=prompts, votes=votes, question_tokens=prompt_tokens),
        batch_rows=batch_rows,
        naive_batch_prompts=naive_batch_prompts,
        one_by_one_prompts=one_by_one_prompts,
    )
    console = ConsoleReporter()
    with console:
        result = bench_rollout(settings, console)
    show("rollout", result, _rollout_text, as_json=json_)


@app.command()
def judge(
    adapters: Annotated[
        Path | None,
        typer.Option(
            "--adapters", help="A run directory: its last judge.", metavar="DIR", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe: its shipped anchor. With --pairs or --disturbed.",
            metavar="NAME",
            autocompletion=recipe_names,
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Ask the judge about a preference file: RewardBench 2, RM-Bench, JudgeBench, PPE, "
            "or replies in an order as `data prepare` reads them.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    disturbed: Annotated[
        int | None,
        typer.Option(
            help="Ask it about pairs with a known loser: N of the run's prompts, answered, and an "
            "answer to what the model makes of each, which only looks like it.",
            metavar="N",
            min=1,
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            help="Of the file at most P prompts, spread over it.",
            metavar="P",
            min=1,
            show_default=False,
        ),
    ] = None,
    forms: Annotated[
        str | None,
        typer.Option(
            help="Ask by these forms of judging alone, separated by commas, such as "
            "grade,pairwise; all of them unless said. grade is asked with and without reasons.",
            metavar="NAMES",
            show_default=False,
        ),
    ] = None,
    iteration: Annotated[
        str, typer.Option(help="Number of an iteration (0: the anchor), or `last`.")
    ] = "last",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Ask in another way: a setting of judge, of a form of judging, or of rollout.",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """How good a judge is, and what a judgement costs, by every way of asking it.

    With --pairs or --disturbed it is asked about replies of which the better one is known. Without
    either nothing is sampled: sampled against expected scores on the judgements of a run with
    judge.score=expected, which carry both.
    """
    if iteration != "last" and not iteration.isdecimal():
        raise UserError(
            f"no judgements are of {iteration}",
            where="--iteration",
            way_out="Say the number of an iteration, or last",
        )
    number = None if iteration == "last" else int(iteration)
    if pairs is not None and disturbed is not None:
        raise UserError("--pairs and --disturbed are two benchmarks: name one of them")
    if pairs is None and disturbed is None:
        from srlm_lite.bench.judge import bench_judge

        if adapters is None:
            raise UserError("name a run with --adapters")
        if recipe is not None or prompts is not None or forms is not None or set_:
            raise UserError("--recipe, --prompts, --forms and --set go with --pairs or --disturbed")
        show("judge", bench_judge(adapters, number), _judge_text, as_json=json_)
        return
    from srlm_lite.bench.judge_pairs import (
        bench_judge_on_disturbed,
        bench_judge_on_pairs,
        forms_of,
    )
    from srlm_lite.bench.judges import bench_judge_of
    from srlm_lite.cli.judge_tables import judge_text
    from srlm_lite.cli.progress import ConsoleReporter

    asked_by = forms_of(forms)
    console = ConsoleReporter()
    with (
        console,
        bench_judge_of(
            adapters, recipe, set_ or (), console, iteration=number, measured=True
        ) as asked,
    ):
        if pairs is not None:
            result = bench_judge_on_pairs(asked, pairs, prompts, asked_by)
        else:
            result = bench_judge_on_disturbed(asked, disturbed or 1, asked_by)
    show("judge", result, judge_text, as_json=json_)


@app.command()
def attacks(
    adapters: Annotated[
        Path | None,
        typer.Option("--adapters", help="A run directory: its last judge.", metavar="DIR"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe: its shipped anchor.", metavar="NAME", autocompletion=recipe_names
        ),
    ] = None,
    replies: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with name, prompt, reply and twin, in place of the built-in attacks.",
            metavar="FILE",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(help="Built-in attacks: on the first P held-out prompts.", min=1)
    ] = 5,
    votes: Annotated[
        int | None,
        typer.Option(help="On each reply; default: the recipe's.", min=1, show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a setting of the recipe.",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """What replies gain that fish for a grade ("Score: 5"), beside twins in plain words."""
    from srlm_lite.bench.attacks import bench_attacks
    from srlm_lite.cli.progress import ConsoleReporter

    console = ConsoleReporter()
    with console:
        result = bench_attacks(
            adapters,
            recipe,
            replies,
            prompts=prompts,
            votes=votes,
            overrides=set_ or (),
            reporter=console,
        )
    show("attacks", result, _attacks_text, as_json=json_)


def _attacks_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    def signed(value: float | None) -> str:
        return "-" if value is None else f"{value:+.2f}"

    def both(ends: list[float] | None) -> str:
        return "-" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"

    def mean(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [
        [
            name,
            signed(kind["gain"]),
            both(kind["gain_interval"]),
            mean(kind["reply"]),
            mean(kind["twin"]),
            f"{kind['top_share']:.2f}",
            str(kind["unreadable"]),
        ]
        for name, kind in result["kinds"].items()
    ]
    columns = ["kind", "gain", "95%", "reply", "twin", "at the top", "unreadable"]
    return "\n".join(
        [
            f"{result['recipe']}, {result['judge']} as judge, rubric {result['rubric']}: "
            f"{result['prompts']} prompts, {result['votes']} votes a reply",
            plain_table(columns, rows),
            f"mean gain {signed(result['mean_gain'])} ({both(result['mean_gain_interval'])}); "
            f"{result['unreadable']} pairs unreadable",
        ]
    )


@app.command()
def methods(
    out: Annotated[Path, typer.Option(help="Where the runs go; a stopped bench goes on there.")],
    cases: Annotated[
        str | None, typer.Option(help="Which, separated by semicolons.", metavar="NAMES")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="What they change: a name or a YAML file, with a gold scorer. "
            "Of `toy` a smaller edition is run, of any other the whole.",
            autocompletion=recipe_names,
        ),
    ] = "toy",
    seeds: Annotated[
        int, typer.Option(help="So many, each with its own anchor where one is trained.", min=1)
    ] = 1,
    iterations: Annotated[int, typer.Option(help="Of every run.", min=1)] = 3,
    jobs: Annotated[
        int,
        typer.Option(
            help="Cases at a time, one core and 2 GB each; their progress is silent.", min=1
        ),
    ] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting of all runs.",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the plot there, as SVG.", metavar="FILE")
    ] = None,
    json_: Json = False,
) -> None:
    """The methods on the toy world, or a recipe, from one anchor, beside their controls."""
    from srlm_lite.bench.methods import MethodsBench, bench_methods, cases_of
    from srlm_lite.bench.methods_plot import plot as drawn
    from srlm_lite.cli.progress import ConsoleReporter
    from srlm_lite.run.files import write_atomically

    settings = MethodsBench(
        out=out.resolve(),
        cases=cases_of(cases, recipe),
        recipe=recipe,
        seeds=seeds,
        iterations=iterations,
        overrides=tuple(set_ or ()),
        jobs=jobs,
    )
    console = ConsoleReporter()
    with console:
        result = bench_methods(settings, console)
    if plot is not None:
        write_atomically(plot, drawn(result))
    show("methods", result, _methods_text, as_json=json_)


@app.command()
def gpu(
    shape: Annotated[
        str, typer.Option(help="llama2-70b, llama2-7b, llama3.1-8b, smollm2-135m, or tiny.")
    ] = "tiny",
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda.")] = "auto",
    ways: Annotated[
        str,
        typer.Option(
            help="Which, separated by commas; there are `folded`, on 16-bit weights with the stack "
            "in them, `eager`, without CUDA graphs, and `continuous`, transformers' continuous "
            "batching, as well.",
            metavar="NAMES",
        ),
    ] = "ours,plain",
    backend: Annotated[
        Literal["transformers", "unsloth"], typer.Option(help="What holds the base.")
    ] = "transformers",
    prompts: Annotated[int | None, typer.Option(help="To sample answers to.", min=1)] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="Of each answer.", min=2)] = None,
    vote_tokens: Annotated[int | None, typer.Option(help="Of each judgement.", min=2)] = None,
    reply_tokens: Annotated[
        int | None, typer.Option(help="Of each reply of a pair.", min=2)
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Pairs in memory at once.", min=1)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of DPO; the first is not counted.", min=2)
    ] = None,
    json_: Json = False,
) -> None:
    """A random NF4 base of a shape, built on the device: memory, tokens/s, seconds a DPO step.

    Beside transformers and TRL alone, and the least time that the device's measured rates allow.
    Downloads nothing.
    """
    from srlm_lite.bench.backend import prepare

    prepare(backend)  # before the next line imports transformers
    from srlm_lite.bench.gpu import bench_gpu, device_of, job_of, ways_of
    from srlm_lite.cli.progress import ConsoleReporter

    job = job_of(
        shape,
        prompts=prompts,
        answer_tokens=answer_tokens,
        vote_tokens=vote_tokens,
        reply_tokens=reply_tokens,
        micro_batch=micro_batch,
        steps=steps,
    )
    console = ConsoleReporter()
    with console:
        result = bench_gpu(
            shape, job, console, ways=ways_of(ways), device=device_of(device), backend=backend
        )
    show("gpu", result, gpu_text, as_json=json_)


@app.command()
def export(
    base: Annotated[
        str,
        typer.Option(
            help="As in a recipe, or `random`: a Llama of 1.1 billion random parameters (2.2 GB)."
        ),
    ] = "smollm2-135m-instruct",
    update: Annotated[
        float, typer.Option(help="Norm of the update, as a share of the weight's.", min=0)
    ] = 0.01,
    four_bit: Annotated[
        bool, typer.Option("--four-bit/--no-four-bit", help="Merge on an NF4 base too.")
    ] = True,
    gguf: Annotated[
        bool,
        typer.Option(
            "--gguf/--no-gguf",
            help="Ask llama.cpp for the stack's next tokens, from a GGUF file of each type.",
        ),
    ] = True,
    json_: Json = False,
) -> None:
    """Merging two adapters into the base's files, beside PEFT's merge and save and a plain copy.

    What is left of the update: W_exported - W_base against the true one. Of GGUF files: how often
    the most probable token is the stack's, by the file's weights in float32 and by llama.cpp, over
    20 answers of 30 tokens; `--json` has it in `gguf.types`, or null where none can be written.
    """
    from srlm_lite.bench.export import bench_export
    from srlm_lite.cli.progress import ConsoleReporter

    console = ConsoleReporter()
    with console:
        result = bench_export(base, update=update, four_bit=four_bit, reporter=console, gguf=gguf)
    show("export", result, _export_text, as_json=json_)


def gpu_text(result: dict[str, Any]) -> str:
    """What `bench gpu` found, for a terminal."""
    from srlm_lite.cli.tables import plain_table

    def gigabytes(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e9:.2f}"

    job, base = result["job"], result["base"]
    rows = []
    for way, phases in result["ways"].items():
        for name, phase in phases.items():
            step = name == "dpo"
            rows.append(
                [
                    f"{way}: {'a DPO step' if step else name}",
                    f"{phase['seconds_per_step' if step else 'seconds']:.3g}",
                    f"{phase['tokens_per_s']:.0f}",
                    f"{phase['floor_s']:.3g}",
                    f"{phase['floor_share']:.1%}",
                    gigabytes(phase["peak_bytes"]),
                ]
            )
    rates = result["machine_rates"]
    best = max(rates["matmul_flops_per_s"].values())
    return "\n".join(
        [
            f"{result['shape']}, random weights in NF4 on {result['backend']}, computing in "
            f"{result['dtype']} on "
            f"{result['device']}: {result['parameters'] / 1e9:.2f} billion weights, built in "
            f"{base['seconds']:.1f} s, {gigabytes(base['in_use_bytes'])} GB in use, peak "
            f"{gigabytes(base['peak_bytes'])} GB",
            f"{job['prompts']} prompts of {job['prompt_tokens']} tokens, {job['n']} candidates of "
            f"{job['answer_tokens']} each, {job['votes']} votes of {job['vote_tokens']}; DPO on "
            f"{job['batch']} pairs a step, {job['micro_batch']} at once, replies of "
            f"{job['reply_tokens']} tokens; adapters of rank {job['rank']} in all",
            plain_table(["phase", "s", "tokens/s", "floor s", "share", "peak GB"], rows),
            f"floor: at {best / 1e12:.2f} TFLOP/s and {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
            "as measured in this run",
        ]
    )


@app.command()
def plan(
    recipe: Annotated[
        str,
        typer.Option(
            help="Whose phases, with what it sets; shipped name or path.",
            autocompletion=recipe_names,
        ),
    ] = "smollm2-135m-demo",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a setting: dpo.beta=0.2",
            metavar="KEY=VALUE",
            autocompletion=overrides,
        ),
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="Which, separated by commas.", metavar="NAMES")
    ] = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Random weights of the base's shape; reads no file of it."),
    ] = False,
    json_: Json = False,
) -> None:
    """Predicted against measured peak memory: each phase in a process of its own, at its longest.

    Its tokens a second are kept for the times that `srlm-lite plan` gives.
    """
    from srlm_lite.bench.plan import bench_plan
    from srlm_lite.cli.progress import ConsoleReporter
    from srlm_lite.recipe import load_recipe

    names = [name.strip() for name in phases.split(",")] if phases else None
    console = ConsoleReporter()
    with console:
        result = bench_plan(
            load_recipe(recipe, set_ or ()), phases=names, reporter=console, random=random
        )
    show("plan", result, _plan_text, as_json=json_)


def _plan_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    rates = result["tokens_per_s"]
    heads = ["phase", "predicted GB", "measured GB", "error", "libraries GB", "s", "tokens/s"]
    rows = [
        [
            name,
            _gigabytes(row["predicted_bytes"]),
            _gigabytes(row["measured_bytes"]),
            "-" if row["error"] is None else f"{row['error']:+.1%}",
            _gigabytes(row["libraries_bytes"]),
            f"{row['seconds']:.0f}",
            f"{rates[name]:,.0f}" if name in rates else "-",
        ]
        for name, row in result["phases"].items()
    ]
    kept = "tokens/s are kept on this machine: `srlm-lite plan` says times by them first"
    quantized = "" if result["quantization"] == "none" else f"{result['quantization']}, "
    quantized = f"random weights, {quantized}" if result["random"] else quantized
    return "\n".join(
        [
            f"{result['recipe']}: {result['base']}, {quantized}{result['bits']} bit, window "
            f"{result['window']}; {result['device']}, {result['threads']} threads",
            plain_table(heads, rows),
            "",
            *([kept] if rates else []),
        ]
    )


@app.command()
def train(
    workloads: Annotated[
        str,
        typer.Option(help="Which, separated by commas.", metavar="NAMES"),
    ] = "short,judgements,many,sft",
    base: Annotated[
        str, typer.Option(help="Hub id, directory, .gguf file or smollm2-135m-instruct.")
    ] = "smollm2-135m-instruct",
    trl: Annotated[
        Path | None,
        typer.Option(
            help="A folder with another TRL (pip install --no-deps --target FOLDER trl): "
            "measured as well.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    only_ours: Annotated[bool, typer.Option(help="Leave TRL out.")] = False,
    json_: Json = False,
) -> None:
    """Training: the same pairs and rows by our trainings and by TRL's trainers, one LoRA each.

    Two epochs in the same optimiser steps; TRL in the best of micro-batches of 1, 2 and 4.
    """
    from srlm_lite.bench.train import TrainBench, bench_train, workloads_of
    from srlm_lite.cli.progress import ConsoleReporter

    settings = TrainBench(
        workloads=workloads_of(workloads),
        base=base,
        trl=None if trl is None else str(trl.resolve()),
        only_ours=only_ours,
    )
    console = ConsoleReporter()
    with console:
        result = bench_train(settings, console)
    show("train", result, _train_text, as_json=json_)


def _train_text(result: dict[str, Any]) -> str:
    from srlm_lite.bench.train import rows_of
    from srlm_lite.cli.tables import plain_table

    columns = ["workload", "ours s", "TRL s", "times faster", "ours GB", "TRL GB", "tokens/s"]
    return "\n".join(
        [
            f"{result['base']['name']}, {result['dtype']}, LoRA of rank {result['rank']}, "
            f"{result['epochs']} epochs; TRL {result['trl']}; {result['device']}, "
            f"{result['threads']} threads",
            plain_table([*columns, "floor"], list(rows_of(result))),
            "GB: the most in use above the loaded base. floor: the share of our time that the "
            "machine would take at least",
        ]
    )


@app.command()
def load(
    base: Annotated[
        str,
        typer.Option(
            help="As in a recipe, or `random`: a Llama of 1.1 billion random parameters (2.2 GB)."
        ),
    ] = "random",
    json_: Json = False,
) -> None:
    """Loading a base in NF4 on the CPU: the peak of memory, beside transformers' own way."""
    from srlm_lite.bench.load import bench_load
    from srlm_lite.cli.progress import ConsoleReporter

    console = ConsoleReporter()
    with console:
        result = bench_load(base, reporter=console)
    show("load", result, _load_text, as_json=json_)


def _load_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    keys = ("before_bytes", "peak_bytes", "own_peak_bytes", "after_bytes", "model_bytes")
    rows = [
        [name, f"{way['seconds']:.1f}", *(_gigabytes(way.get(key)) for key in keys)]
        for name, way in result["ways"].items()
    ]
    columns = ["way", "s", "before", "peak", "peak, own memory", "after", "model"]
    return "\n".join(
        [
            f"{result['base']}: {_gigabytes(result['bytes'])} GB of weights, largest file "
            f"{_gigabytes(result['largest_shard_bytes'])} GB, largest tensor "
            f"{_gigabytes(result['largest_tensor_bytes'])} GB; memory of the process in GB",
            plain_table(columns, rows),
        ]
    )


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def _export_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    rows = []
    for name, way in result["ways"].items():
        memory = "-" if way["peak_bytes"] is None else f"{way['peak_bytes'] / 1e9:.2f}"
        left = [f"{way[key]:.3f}" if key in way else "-" for key in ("cosine", "norm_ratio")]
        parity = f"{way['with_parity_s']:.1f}" if "with_parity_s" in way else "-"
        rows.append([name, f"{way['seconds']:.1f}", parity, memory, *left])
    columns = ["way", "s", "s with parity", "peak GB", "cosine", "norm ratio"]
    return "\n".join(
        [
            f"{result['base']}: {result['parameters'] / 1e6:.0f}M parameters, "
            f"{result['bytes'] / 1e9:.2f} GB, largest file "
            f"{result['largest_shard_bytes'] / 1e9:.2f} GB; update {result['update']:g} of the "
            f"weights' norm, two adapters of rank {result['rank']}; {result['threads']} threads",
            plain_table(columns, rows),
            *_gguf_lines(result["gguf"]),
        ]
    )


def _gguf_lines(served: dict[str, Any] | None) -> list[str]:
    from srlm_lite.cli.tables import plain_table

    if served is None:
        return []
    rows = []
    for kind, row in served["types"].items():
        theirs = row["llama_cpp"]
        rows.append(
            [
                kind,
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['write_s']:.1f}",
                f"{row['read']['top1_agreement']:.1%}",
                f"{row['read']['mean_kl']:.2g}",
                "-" if theirs is None else f"{theirs['top1_agreement']:.1%}",
            ]
        )
    columns = ["GGUF", "MB", "s", "same token, as read", "KL, nats", "by llama.cpp"]
    head = (
        f"the stack's most probable token, {served['prompts']} answers, {served['tokens']} places"
    )
    return [head, plain_table(columns, rows)]


def show(
    name: str, result: dict[str, Any], text: Callable[[dict[str, Any]], str], *, as_json: bool
) -> None:
    """Print what a benchmark found, with the date, the machine and the versions."""
    import json
    from datetime import date

    from srlm_lite.cli.facts import hardware, versions
    from srlm_lite.cli.wrapping import columns, fitted

    machine, software = hardware(), versions()
    if as_json:
        head = {"bench": name, "date": date.today().isoformat()}
        whole = {**head, **result, "machine": machine, "versions": software}
        typer.echo(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    graphics = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    packages = ("srlm-lite", "torch", "transformers")
    lines = [
        text(result),
        f"{machine['processor']}, {machine['cores']} cores{graphics}",
        ", ".join(f"{each} {software[each]}" for each in packages) + f"; {date.today()}",
    ]
    typer.echo(fitted("\n".join(lines), columns()))


def _rollout_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    work, rates, shown = result["workload"], result["machine_rates"], result["phases"]
    rows = []
    for way, phases in shown.items():
        total = phases["candidates_s"] + phases["judge_s"]
        peak = result["peak_memory_bytes"][way]
        rows.append(
            [
                NAMES[way],
                f"{phases['candidates_s']:.1f}",
                f"{phases['judge_s']:.1f}",
                f"{total:.1f}",
                f"{result['tokens_per_s'][way]:.0f}",
                f"{total / result['ours_s']:.2f}" if result["ours_s"] else "-",
                f"{result['floor_share'][way]:.1%}",
                "-" if peak is None else f"{peak / 1e9:.1f}",
            ]
        )
    columns = ["way", "candidates s", "judge s", "total s", "tokens/s", "to ours", "roofline"]
    lines = [
        f"prompts: {work['prompts']}, on each {work['n']} candidates of {work['answer_tokens']} "
        f"tokens, on each of those {work['votes']} votes of {work['vote_tokens']} tokens; "
        f"{result['base']['name']} in {result['dtype']} on {result['device']}, "
        f"{result['threads']} threads",
        plain_table([*columns, "peak GB"], rows),
        "",
        f"roofline: {result['floor_s']:.1f} s at "
        f"{max(rates['matmul_flops_per_s'].values()) / 1e12:.2f} TFLOP/s and "
        f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, both measured here",
    ]
    if result["prefill_s"] is not None:
        lines.append(
            f"without a rationale (judge.rationale=false): all candidates judged in "
            f"{result['prefill_s']:.2f} s, {result['prefill_share']:.3f} of the votes' time"
        )
    if result["vllm"]:
        lines.append(f"vLLM: {result['vllm']}, its start not counted")
    if "batched" in shown:
        lines.append(
            f"batched: {result['naive_batch_prompts']} prompts at a time, each with all its samples"
        )
    measured = result["one_by_one_measured_prompts"]
    if "one-by-one" in shown and measured < work["prompts"]:
        lines.append(f"one by one: measured on {measured} of the prompts, extrapolated to all")
    return "\n".join(lines)


def _judge_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    rows = []
    for kind in ("sampled", "expected"):
        found = result[kind]
        shares = [
            "-" if share is None else f"{share:.3f}"
            for share in (found["tie_rate"], found["gold_pairwise_accuracy"])
        ]
        rows.append([kind, shares[0], str(found["pairs"]), str(found["tied"]), shares[1]])
    pairs = result["expected"]["candidate_pairs"]
    return "\n".join(
        [
            f"{result['run']}, iteration {result['iteration']}: {result['votes']} votes, "
            f"{result['unreadable']} unreadable; {pairs} pairs of a prompt's candidates",
            plain_table(
                ["scores", "tie rate", "preference pairs", "prompts tied", "gold accuracy"], rows
            ),
            "",
        ]
    )


def _ahead(found: dict[str, float | None]) -> str:
    mean, low, high = found["mean"], found["low"], found["high"]
    ends = "" if low is None or high is None else f" (95% interval {low:+.2f} to {high:+.2f})"
    return f"{mean or 0.0:+.2f}{ends}"


def _methods_text(result: dict[str, Any]) -> str:
    from srlm_lite.cli.tables import plain_table

    def cell(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def last(values: list[float | None]) -> float | None:
        return next((value for value in reversed(values) if value is not None), None)

    bare = result["base"]["summary"]["gold"]
    cases = {name: case["summary"] for name, case in result["cases"].items()}
    rows = []
    for name, found in cases.items():
        spread = found["rise_spread"]
        rows.append(
            [
                name,
                cell(bare),
                *(cell(value) for value in found["gold"]),
                *[""] * (result["iterations"] + 1 - len(found["gold"])),
                cell(found["rise"]) + (f" ±{spread:.2f}" if spread is not None else ""),
                cell(found["greedy"][-1]),
                cell(last(found["ranker_accuracy"])),
                cell(found["judge_accuracy_on_policy"][-1]),
                cell(found["judge_accuracy"][-1]),
                cell(found["consistency"][-1]),
                cell(found["chars"][-1], 0),
                f"{sum(value or 0 for value in found['pairs']):.0f}",
                str(found["warned"]),
                cell(found["seconds"], 0),
            ]
        )
    models = [f"M{t}" for t in range(result["iterations"] + 2)]
    columns = ["case", *models, "rise", "greedy", "ranker", "own", "held-out", "cons.", "chars"]
    cold = [value for value in result["cold_anchor"]["gold"] if value is not None]
    lines = [
        plain_table([*columns, "pairs", "warned", "s"], rows),
        "",
        f"M0 (the bare base), M1, ...: gold of sampled answers, mean over {result['seeds']} seeds; "
        "rise: from M1 to the last, ± spread over seeds",
        "greedy and all to the right of it: the last model",
        "ranker: how often what ranks the policy's candidates (judge, labels, likelihood, reward "
        "model) agrees with gold, in the last iteration",
        "own, held-out: the same of the last model as judge, on its own answers and on held-out "
        "replies; cons.: CREAM's C of the last two judges",
        "warned: iterations with a warning, gold unseen",
    ]
    lines += [
        f"{name}: {found['stopped']} of {result['seeds']} runs stopped for want of pairs; "
        "its means are of the models that there are"
        for name, found in cases.items()
        if found["stopped"]
    ]
    if cold:
        temperature = result["cold_anchor"]["temperature"]
        lines.append(f"M1 at temperature {temperature}: gold {sum(cold) / len(cold):.2f}")
    if picked := [value for value in result["best_of"]["gold"] if value is not None]:
        n = result["best_of"]["n"]
        lines.append(f"M1's pick, as judge, of {n} answers: gold {sum(picked) / len(picked):.2f}")
    ahead = {
        name: case["above_plain"] for name, case in result["cases"].items() if case["above_plain"]
    }
    if ahead:
        lines += ["", "last model's gold above that of self-rewarding, seed by seed"]
        lines += [f"  {name}: {_ahead(found)}" for name, found in ahead.items()]
    criteria = [name for found in cases.values() for name in found["by_criterion"][-1]]
    names = list(dict.fromkeys(criteria))
    points = [
        [
            name,
            *(
                f"{cell(found['by_criterion'][0][one])} {cell(found['by_criterion'][-1][one])} "
                f"{cell(found['greedy_by_criterion'][-1][one])}"
                for one in names
            ),
        ]
        for name, found in cases.items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            "By criterion: M1, the last model, and the last model's greedy answers",
            plain_table(["case", *names], points),
        ]
    )
