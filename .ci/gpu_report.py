"""Everything that only a GPU can show, in one go: `make gpu`, or `python .ci/gpu_report.py`.

Runs the tests marked `gpu`, then the benchmarks, each in a process of its own; writes what each
gave to OUT/*.json, and puts a section into BENCHMARKS.md between two marks, so that it can be made
again. A benchmark that fails is reported as failed and the others go on. `--render-only` makes the
section from files that are there already.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- made by `make gpu`; do not edit: begin -->"
END = "<!-- made by `make gpu`: end -->"

SHAPES = ("llama3.1-8b", "llama2-70b", "llama2-7b", "tiny")
WAYS = ("ours", "folded", "eager", "continuous", "plain")
"""Each in a process of its own: one that fails, or runs out of time, takes no other with it."""
NOT_FOLDED = "llama2-70b"
"""No device holds its 16-bit copy beside it."""
PLANS = ("llama3.1-8b", "llama2-70b")
PHASES = ("DPO", "anchor SFT", "judge", "candidates", "evaluation", "load")
SHORT = ("rollout.max_new_tokens=64", "judge.max_new_tokens=32", "rollout.chunk_prompts=8")
"""As long as the window all the same: prompts fill what answers leave."""
ROLLOUT = "ours,continuous,batched"
WINDOWED = "gemma3-270m"
"""A shape most of whose layers see a window, beside SmolLM2, whose layers see all."""
EXTRAS = ("vllm", "unsloth")
"""Packages that have `gpu` tests of their own, and are their marker's name."""


def main() -> int:
    """Run and render; 0 where every test passed and every benchmark ended well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="for the JSON files")
    parser.add_argument("--into", type=Path, default=ROOT / "BENCHMARKS.md")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of bench gpu; empty for none")
    parser.add_argument(
        "--plans", default=",".join(PLANS), help="recipes of bench plan; empty for none"
    )
    parser.add_argument("--device", default="cuda", help="cpu to try this script without a GPU")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-rollout", action="store_true", help="leave out bench rollout")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each part")
    parser.add_argument(
        "--budget", type=float, help="seconds for all of it; what does not fit is told as such"
    )
    parser.add_argument("--render-only", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not options.render_only and not has_gpu():
        print("torch sees no GPU here (--device cpu tries the script without one)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    ended_well = options.render_only or run(options)
    put_section(options.into, section(options.out))
    print(f"written: {options.into}, {options.out}/*.json", file=sys.stderr)
    return 0 if ended_well else 1


def has_gpu() -> bool:
    """Whether there is one; asked of a process that ends, for the parts want all of its memory."""
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked]).returncode == 0


def run(options: argparse.Namespace) -> bool:
    """Run every part that was asked for, the most telling first."""
    end = math.inf if options.budget is None else time.monotonic() + options.budget

    def left() -> float:
        return min(options.timeout, max(0.0, end - time.monotonic()))

    ended_well = options.no_tests or run_tests(options.out, left())
    for name, words in parts_of(options).items():
        command = [sys.executable, "-m", "srlm_lite", *words, "--json"]
        ended_well &= run_part(name, command, options.out / f"{name}.json", left())
    return ended_well


def parts_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """The benchmarks by name: the words of each command."""
    shapes, plans = (list(filter(None, one.split(","))) for one in (options.shapes, options.plans))
    parts = {"doctor": ["doctor"]}
    rollout = ["bench", "rollout", "--engines", ROLLOUT]
    if not options.no_rollout:
        parts[f"rollout-{WINDOWED}"] = [*rollout, "--base", f"random:{WINDOWED}"]
    for shape in shapes:
        parts |= _shape_parts(shape, options.device)
        if shape in plans:
            parts |= _plan_parts(shape)
    for recipe in plans:
        if recipe not in shapes:
            parts |= _plan_parts(recipe)
    if not options.no_rollout:
        parts["rollout"] = rollout
    return parts


def _shape_parts(shape: str, device: str) -> dict[str, list[str]]:
    words = ["bench", "gpu", "--shape", shape, "--device", device]
    ways = [way for way in WAYS if (way, shape) != ("folded", NOT_FOLDED)]
    parts = {f"gpu-{shape}-{way}": [*words, "--ways", way] for way in ways}
    if is_installed("unsloth"):
        parts[f"gpu-{shape}-unsloth"] = [*words, "--backend", "unsloth", "--ways", "ours"]
    return parts


def _plan_parts(recipe: str) -> dict[str, list[str]]:
    settings = [word for setting in SHORT for word in ("--set", setting)]
    words = ["bench", "plan", "--recipe", recipe, "--random", *settings]
    return {
        f"plan-{recipe}-{phase.replace(' ', '_')}": [*words, "--phases", phase] for phase in PHASES
    }


def marks() -> str:
    """Marks of its tests; an extra, which has an environment of its own, counts where installed."""
    return " and not ".join(["gpu", *(extra for extra in EXTRAS if not is_installed(extra))])


def is_installed(extra: str) -> bool:
    """Without importing it."""
    return importlib.util.find_spec(extra) is not None


def run_tests(out: Path, timeout: float) -> bool:
    """The tests marked `gpu`, and how many passed, failed and were skipped."""
    report = out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks(), f"--junitxml={report}"]
    say("tests")
    try:
        code, _, _ = ended(command, timeout, pipes=None)
    except subprocess.TimeoutExpired:
        code = -1
    counts: dict[str, Any] = {"passed": 0, "failed": [], "skipped": 0, "exit_code": code}
    if report.is_file():
        for case in ET.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                counts["failed"].append(f"{case.get('classname')}::{case.get('name')}")
            elif "skipped" in kinds:
                counts["skipped"] += 1
            else:
                counts["passed"] += 1
    (out / "tests.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return code == 0


def run_part(name: str, command: list[str], file: Path, timeout: float) -> bool:
    """One command whose stdout is JSON; what went wrong is kept as JSON as well."""
    say(name)
    begin = time.monotonic()
    try:
        if not timeout:
            raise subprocess.TimeoutExpired(command, timeout)
        code, stdout, stderr = ended(command, timeout)
        found = json.loads(stdout) if stdout.startswith("{") else {}
        if code != 0:
            found |= {"failed": (stderr.strip().splitlines() or ["no message"])[-1]}
    except subprocess.TimeoutExpired:
        found = {"failed": f"did not end in {timeout:.0f} s"}
    found |= {"part": name, "wall_s": round(time.monotonic() - begin, 1)}
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if "failed" in found:
        say(f"{name} failed: {found['failed']}")
    return "failed" not in found


def ended(
    command: list[str], timeout: float, *, pipes: int | None = subprocess.PIPE
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; with no pipes it speaks for itself.

    Out of time it ends with all that it has started: what went on would hold the device's memory.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=pipes,
        stderr=pipes,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, stdout, stderr


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(f"gpu_report: {text}", file=sys.stderr, flush=True)


def section(out: Path) -> str:
    """The section's text, from the files of the last run."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")}
    lines = [
        *_head(files),
        *_tests(files.get("tests")),
        *_gpu(files),
        *_plans(files),
        *_rollouts(files),
    ]
    return "\n".join(lines).strip() + "\n"


def _head(files: dict[str, Any]) -> list[str]:
    benches = [found for found in files.values() if "machine" in found and "versions" in found]
    if not benches:
        return ["No benchmark ended well."]
    machine, versions = benches[0]["machine"], benches[0]["versions"]
    graphics = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"{benches[0]['date']}: {graphics}; {machine['processor']}, {machine['cores']} cores."]
    for finding in files.get("doctor", {}).get("machine", []):
        if finding["name"].startswith("GPU"):
            lines.append(f"{finding['name']}: {finding['text']}.")
    return [*lines, f"Versions: {named}.", ""]


def _tests(counts: dict[str, Any] | None) -> list[str]:
    if counts is None:
        return []
    failed = counts["failed"]
    text = f"Tests marked `gpu`: {counts['passed']} passed, {len(failed)} failed"
    text += f", {counts['skipped']} skipped."
    return [text, *(f"- failed: `{name}`" for name in failed), ""]


def _gpu(files: dict[str, Any]) -> list[str]:
    found = {name: row for name, row in files.items() if name.startswith("gpu-")}
    if not found:
        return []
    lines = [
        "Random NF4 bases of a shape, built on the device (`srlm-lite bench gpu`). Floor: the",
        "least time at the rates measured in the same run.",
        "",
        "| shape | way | phase | seconds | tokens/s | share of the floor | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    told = set()
    for name, result in sorted(found.items()):
        if "failed" in result:
            notes.append(f"- `{name.removeprefix('gpu-')}` failed: {result['failed']}")
            continue
        for way, phases in result["ways"].items():
            for phase, row in phases.items():
                took = row["seconds_per_step"] if phase == "dpo" else row["seconds"]
                held = " on Unsloth" if result.get("backend") == "unsloth" else ""
                label = "a DPO step" if phase == "dpo" else phase
                peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
                lines.append(
                    f"| {result['shape']} | {way}{held} | {label} | {took:.3g} | "
                    f"{row['tokens_per_s']:.0f} | {row['floor_share']:.3f} | {peak} |"
                )
        if (result["shape"], result.get("backend")) in told:
            continue
        told.add((result["shape"], result.get("backend")))
        base, rates = result["base"], result["machine_rates"]
        in_use = base["in_use_bytes"] or base["bytes"]
        best = max(rates["matmul_flops_per_s"].values()) / 1e12
        job = result["job"]
        notes.append(
            f"- `{name.removeprefix('gpu-')}`: {result['parameters'] / 1e9:.2f} billion weights "
            f"built in {base['seconds']:.1f} s, {in_use / 1e9:.2f} GB in use, peak while building "
            f"{(base['peak_bytes'] or 0) / 1e9:.2f} GB; {best:.2f} TFLOP/s, "
            f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s. {job['prompts']} prompts x {job['n']} "
            f"candidates of {job['answer_tokens']} tokens, {job['votes']} votes of "
            f"{job['vote_tokens']}; {job['batch']} pairs a step, {job['micro_batch']} at once, "
            f"replies of {job['reply_tokens']} tokens."
        )
    return [*lines, "", *notes, ""]


def _plans(files: dict[str, Any]) -> list[str]:
    found = {name: row for name, row in files.items() if name.startswith("plan-")}
    if not found:
        return []
    lines = [
        "`srlm-lite bench plan --random`: peaks of what torch allocates, predicted and measured.",
        "",
        "| recipe | phase | predicted GB | measured GB | error | s |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for name, result in sorted(found.items()):
        if "failed" in result:
            notes.append(f"- `{name}` failed: {result['failed']}")
            continue
        for phase, row in result["phases"].items():
            lines.append(
                f"| {result['recipe']} | {phase} | {row['predicted_bytes'] / 1e9:.2f} | "
                f"{row['measured_bytes'] / 1e9:.2f} | {row['error']:+.1%} | {row['seconds']:.0f} |"
            )
    return [*lines, "", *notes, ""]


def _rollouts(files: dict[str, Any]) -> list[str]:
    found = {name: row for name, row in files.items() if name.split("-")[0] == "rollout"}
    return [line for _, result in sorted(found.items()) for line in _rollout(result)]


def _rollout(result: dict[str, Any]) -> list[str]:
    if "failed" in result:
        return [f"`bench rollout` ({result['part']}) failed: {result['failed']}", ""]
    base, dtype = result["base"]["name"], result["dtype"]
    lines = [
        f"`srlm-lite bench rollout`, {base} in {dtype} on {result['device']}:",
        "",
        "| way | candidates s | judgements s | tokens/s | share of the floor |",
        "|---|---|---|---|---|",
    ]
    for way, phase in result["phases"].items():
        lines.append(
            f"| {way} | {phase['candidates_s']:.2f} | {phase['judge_s']:.2f} | "
            f"{result['tokens_per_s'][way]:.0f} | {result['floor_share'][way]:.3f} |"
        )
    return [*lines, ""]


def put_section(file: Path, text: str) -> None:
    """Replace what is between the marks.

    Raises:
        SystemExit: The file has no marks, or not in this order.
    """
    whole = file.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{file}: the marks of this section are missing")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
