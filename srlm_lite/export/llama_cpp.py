"""llama.cpp, as what is installed of it: its converter, its quantizer, and its Python package.

The package `xllamacpp` answers from a file in a process of its own, so that what llama.cpp prints,
or a file that it dies of, stays there.

python -m srlm_lite.export.llama_cpp < question.json > answer.json
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from srlm_lite.errors import SrlmError, UserError

SETTING = "SRLM_LITE_LLAMA_CPP"
"""Environment variable: the directory of llama.cpp, before what is on PATH."""
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
_PACKAGE = "xllamacpp"
_FOLDERS = (".", "build/bin", "bin")
_UNLIKELY = 1000.0


class LlamaCppError(SrlmError):
    """What llama.cpp said when it failed: one line."""


def found(name: str) -> Path | None:
    """A tool of llama.cpp: in the directory that the environment names, else on PATH.

    Raises:
        UserError: The environment names what is no directory.
    """
    if place := os.environ.get(SETTING):
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise UserError("is no directory", where=f"{SETTING}={place}", way_out="Unset it")
        for inner in _FOLDERS:
            if (folder / inner / name).is_file():
                return folder / inner / name
    there = shutil.which(name)
    return None if there is None else Path(there)


def convert(script: Path, folder: Path, out: Path, kind: str) -> None:
    """llama.cpp's own conversion of a directory of transformers.

    Raises:
        LlamaCppError: It does not take the model.
    """
    _run([sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", kind])


def quantize(tool: Path, file: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantization of a file in 16 or 32 bits.

    Raises:
        LlamaCppError: It cannot.
    """
    _run([str(tool), str(file), str(out), kind.upper()])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise LlamaCppError(lines[-1][:300] if lines else f"it ends with {done.returncode}")


def installed() -> bool:
    """Whether llama.cpp's Python package is."""
    return importlib.util.find_spec(_PACKAGE) is not None


@dataclass(frozen=True, slots=True)
class Asking:
    """What to ask llama.cpp of one file."""

    file: str
    contexts: Sequence[Sequence[int]] = ()
    """Ids; asked is the log-probability of what comes next."""
    top: int = 1
    """How many tokens are told with their probability, the most probable first."""
    texts: Sequence[str] = ()
    """Asked are their ids, special tokens read as such and BOS where the file says so."""
    messages: Sequence[Mapping[str, str]] = ()
    """Asked is the prompt that the file's chat template makes of them."""
    ends: Sequence[int] = ()
    """Asked is whether each of these tokens ends a reply."""
    threads: int = 1
    window: int = 512


@dataclass(frozen=True, slots=True)
class Told:
    """What llama.cpp says."""

    likely: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each context, tokens and their log-probabilities."""
    ids: list[list[int]] = field(default_factory=list)
    prompt: str = ""
    """Empty where the template failed; `template_error` says how."""
    template_error: str = ""
    ends: list[bool] = field(default_factory=list)


def ask(question: Asking) -> Told:
    """Ask llama.cpp, in a process of its own.

    Raises:
        LlamaCppError: It does not load the file, or dies.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asdict(question)),
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if "rror" in line] or ["it died"]
        raise LlamaCppError(" ".join(said[-1].split())[:300])
    return Told(**json.loads(lines[-1]))


_RUNNING: list[Any] = []
"""Servers, never ended: xllamacpp 2026.10.11549 has been seen to wait for ever for that."""


def _answer(asked: Asking) -> Told:
    xllamacpp: Any = importlib.import_module(_PACKAGE)
    settings = xllamacpp.CommonParams()
    settings.model.path = asked.file
    settings.n_ctx = settings.n_batch = settings.n_ubatch = asked.window
    settings.n_parallel = 1
    settings.warmup = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = asked.threads
    settings.port = 0
    # As exact as it can be: keys and values in float32, and attention written out.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    _RUNNING.append(server)
    address = server.listening_address

    def post(path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def likely(ids: Sequence[int], probe: int) -> list[tuple[int, float]]:
        said = post(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=asked.top,
            temperature=-1.0,
            # No probabilities come with a token that ends, or is part of a letter.
            logit_bias=[[probe, _UNLIKELY]],
        )
        rows = said["completion_probabilities"][0]["top_logprobs"]
        return [(row["id"], row["logprob"]) for row in rows]

    def ends(token: int) -> bool:
        said = post("/completion", prompt=[token], n_predict=2, logit_bias=[[token, _UNLIKELY]])
        return bool(said["stop_type"] == "eos")

    ids = [
        post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        for text in asked.texts
    ]
    probe = post("/tokenize", content="a", add_special=False)["tokens"][-1]
    prompt = error = ""
    if asked.messages:
        try:
            prompt = post("/apply-template", messages=list(asked.messages))["prompt"]
        except urllib.error.HTTPError as failed:
            error = " ".join(failed.read().decode(errors="replace").split())[:300]
    found = Told(
        [likely(context, probe) for context in asked.contexts],
        ids,
        prompt,
        error,
        [ends(token) for token in asked.ends],
    )
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_answer(Asking(**json.load(sys.stdin))))) + "\n")
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's threads are of no more use
