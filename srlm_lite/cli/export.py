"""`srlm-lite export`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import typer

from srlm_lite.cli.progress import ConsoleReporter
from srlm_lite.errors import UserError
from srlm_lite.export.export import Export, ExportWish
from srlm_lite.export.gguf import GgufExport
from srlm_lite.export.hub import LARGE, check_base_id, check_repo, files_of, push
from srlm_lite.export.source import FinishedModel, find_source
from srlm_lite.progress import Reporter


def run_export(
    *,
    directory: Path,
    which: str,
    wish: ExportWish,
    push_to: str | None,
    public: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export one model of a run, and upload it if asked to."""
    _refuse_idle_options(wish, push_to, public=public)
    if push_to is not None:
        check_repo(push_to, needs_token=not dry_run)
    console = ConsoleReporter()
    source = find_source(directory, which)
    with console:
        export = export_of(source, wish, console)
        if dry_run:
            _show_plan(export, push_to, public=public, as_json=as_json)
            return
        console.say(f"exporting {source.name} as {wish.form} to {wish.out}")
        _say_onto(console, export)
        if wish.form == "merged" and export.generation[1]:
            console.say(f"  {export.generation[1]}")
        begin = time.monotonic()
        row = export.make()
        console.say(f"  {time.monotonic() - begin:.1f} s")
        if isinstance(export, GgufExport) and export.fell_back:
            console.say(
                f"  written by the package gguf: llama.cpp's converter ({export.fell_back})"
            )
    typer.echo(json.dumps(row, indent=2) if as_json else _parity_text(row))
    for text in (*_warnings(row), *_of_adapter(export)):
        console.warn(text)
    if push_to is not None:
        _upload(console, source.name, wish.out, push_to, public=public)
        return
    if wish.form == "gguf":
        file = shlex.quote(str(wish.out / row["file"]))
        console.say(f"next: llama-server --model {file}, or ollama create with its Modelfile")
    if wish.form == "merged":
        model = f"AutoModelForCausalLM.from_pretrained({str(wish.out)!r})"
        console.say(f"next: in Python, {model}, or vllm serve {shlex.quote(str(wish.out))}")


def export_of(source: FinishedModel, wish: ExportWish, reporter: Reporter) -> Export:
    """The export of a wish, which is not at work yet."""
    return (GgufExport if wish.form == "gguf" else Export)(source, wish, reporter)


def _refuse_idle_options(wish: ExportWish, push_to: str | None, *, public: bool) -> None:
    """Refuse what would do nothing.

    Raises:
        UserError: An option is of another form, or speaks of an upload that is not asked for.
    """
    if public and push_to is None:
        raise UserError(
            "says how an upload is seen, and none is asked for",
            where="--public",
            way_out="Say --push-to-hub ORG/NAME, or leave it out",
        )
    if wish.quantize is not None and wish.form != "gguf":
        raise UserError(
            "is of a GGUF file",
            where=f"--quantize {wish.quantize}",
            way_out="Say --as gguf, or leave it out",
        )
    if wish.base_id is not None:
        if wish.form != "adapter":
            raise UserError(
                "is of an adapter: other exports hold the base in them",
                where=f"--base-id {wish.base_id}",
                way_out="Say --as adapter, or leave it out",
            )
        check_base_id(wish.base_id)


def _of_adapter(export: Export) -> list[str]:
    if export.wish.form != "adapter" or export.names_a_base:
        return []
    return [
        f"nobody else finds the base by its name, {export.public_base[0]}: --base-id ORG/NAME says "
        "where it is on the Hub, and its card and adapter_config.json say that then"
    ]


def _upload(console: ConsoleReporter, name: str, folder: Path, repo: str, *, public: bool) -> None:
    files = [file for file, _ in files_of(folder) if file.endswith(LARGE)]
    console.say(f"uploading to {repo}, {'public' if public else 'private'}")

    def tell(file: str, size: int) -> None:
        place = f"{files.index(file) + 1} of {len(files)}"
        console.say(f"  {file}, {size / 1e6:,.1f} MB ({place})")

    address = push(
        folder,
        repo,
        public=public,
        message=f"{name}, exported by srlm-lite",
        bars=sys.stderr.isatty(),
        on_file=tell,
    )
    console.say(f"  {address}")


def _say_onto(console: ConsoleReporter, export: Export) -> None:
    recipe = export.source.recipe.base
    if export.wish.form == "adapter":
        return
    if isinstance(export, GgufExport):
        console.say(f"  {export.rounding}")
    if export.files.kind == "gguf":
        console.say(
            f"  onto dequantized: {Path(recipe.name).name} is a GGUF file, so there is no 16-bit "
            "original; merged is onto the weights that it expands to"
        )
    if recipe.quantization == "nf4":
        console.say(
            "  onto original: the base's own weights; the adapters were trained against their NF4 "
            "rounding (--onto dequantized)"
            if export.onto == "original"
            else "  onto dequantized: the weights that the adapters were trained against"
        )


def _parity_text(row: dict[str, Any]) -> str:
    lines = [
        f"parity of stack and export, {row['positions']} positions, {row['dtype']}:",
        f"  largest logit difference  {row['max_abs_logit_diff']:.3g}  "
        f"(tolerance {row['tolerance']:.3g})",
        f"  mean logit difference     {row['mean_abs_logit_diff']:.3g}  "
        f"(the last adapter's effect: {row['last_adapter_mean_abs_logit_diff']:.3g})",
        f"  mean KL                   {row['mean_kl']:.3g} nats",
        f"  same most probable token  {row['top1_agreement']:.1%}",
    ]
    if "tensors" in row:
        tensors = row["tensors"]
        lines.append(
            f"  tensors                   all right; {tensors['most_different']} differs most, by "
            f"{tensors['relative_error']:.1g} of its norm (tolerance {tensors['tolerance']:.1g})"
        )
    if row.get("llama_cpp"):
        said = row["llama_cpp"]
        lines.append(
            f"llama.cpp ({said['package']}) beside the file, {said['positions']} positions: mean "
            f"KL {said['mean_kl']:.3g} nats, same most probable token {said['top1_agreement']:.1%}"
        )
    elif row["form"] == "gguf":
        lines.append("llama.cpp was not asked (pip install xllamacpp)")
    if "against_nf4" in row:
        other = row["against_nf4"]
        lines.append(
            "against the stack on NF4, as it was trained and evaluated: mean logit difference "
            f"{other['mean_abs_logit_diff']:.3g}, mean KL {other['mean_kl']:.3g} nats, same most "
            f"probable token {other['top1_agreement']:.1%}"
        )
    return "\n".join(lines)


_EXACTLY = {"merged": " exactly", "adapter": " exactly"}


def _warnings(row: dict[str, Any]) -> list[str]:
    told = []
    if not row["mean_abs_logit_diff"] <= row["last_adapter_mean_abs_logit_diff"]:
        finer = "a finer --quantize" if row["form"] == "gguf" else "--dtype float32"
        told.append(
            f"rounding to {row['dtype']} moves the logits more than the last adapter does: "
            f"{finer}, or --as adapter, keeps small updates{_EXACTLY.get(row['form'], '')}"
        )
    said = row.get("llama_cpp") or {}
    if said and not said["same_prompt"]:
        told.append(
            "llama.cpp makes another prompt of a conversation than the chat template here"
            + (f" ({said['template_error']})" if said["template_error"] else "")
            + ": chat with it by raw prompts, or name a simpler base.chat_template"
        )
    missing = said.get("not_ended_by", row.get("stop_ids", {}).get("missing", []))
    if missing:
        told.append(
            f"the file has no place for every token that ends a reply: {missing} are missing, and "
            "go on; Ollama stops at them by its Modelfile"
        )
    return told


def _show_plan(export: Export, push_to: str | None, *, public: bool, as_json: bool) -> None:
    """What would be written, and uploaded; weights are listed from the plan, not made."""
    files = export.listing()
    if as_json:
        visible = "public" if public else "private"
        rows = [{"file": name, "bytes": size} for name, size in files]
        typer.echo(json.dumps({"repo": push_to, "visibility": visible, "files": rows}, indent=2))
        return
    if push_to is not None:
        typer.echo(f"{push_to}, {'public' if public else 'private'}:")
    width = max(len(name) for name, _ in files)
    for name, size in files:
        typer.echo(f"  {name:<{width}}  {_megabytes(size)}")
    total = sum(size for _, size in files if size is not None)
    typer.echo(f"  {'total':<{width}}  {_megabytes(total)}")


def _megabytes(size: int | None) -> str:
    return "small, once made" if size is None else f"{size / 1e6:>12,.3f} MB"
