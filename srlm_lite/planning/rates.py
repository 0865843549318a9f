"""How fast phases went on a device of this user's, as measured there.

Rates lie in `rates.json` in the cache, by device, base, quantization and dtype: tokens a second of
each phase. `srlm-lite bench plan` writes them; a plan takes them before any that were measured
elsewhere (`planning.times`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from srlm_lite.planning.gpus import known_gpu
from srlm_lite.settings import Shared

Rates = Mapping[str, float]
"""Tokens a second by phase: of those that sample, drawn; of those that train, trained on."""


def rates_folder() -> Path:
    """Where this user's rates lie: the cache."""
    from srlm_lite.model.cache import cache_dir

    return cache_dir()


def rates_key(recipe: Shared, *, device: str, itemsize: int) -> str:
    """What rates are kept under: the device's name, and what of the base decides its speed."""
    base = Path(recipe.base.name).name.lower()
    folded = " | folded" if recipe.rollout.fold else ""
    return f"{device} | {base} | {recipe.base.quantization} | {8 * itemsize} bit{folded}"


def known_rates(folder: Path, key: str) -> tuple[Rates, str] | None:
    """The rates under a key and the date they were measured; None where there are none."""
    row = _read(folder).get(key)
    return None if row is None else (row["tokens_per_s"], row["date"])


def rates_of(
    folder: Path, recipe: Shared, *, device: str, itemsize: int
) -> tuple[Rates, str] | None:
    """The rates of a recipe's base on a device, whatever its driver calls it; None: none are."""
    found = known_rates(folder, rates_key(recipe, device=device, itemsize=itemsize))
    gpu = known_gpu(device)
    if found is not None or gpu is None:
        return found
    rest = rates_key(recipe, device="", itemsize=itemsize)
    for key in _read(folder):
        if key.endswith(rest) and known_gpu(key.removesuffix(rest)) == gpu:
            return known_rates(folder, key)
    return None


def remember(folder: Path, key: str, rates: Rates) -> None:
    """Keep rates that were measured just now, beside those that others measure meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".rates.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        every = _read(folder)
        before = every.get(key, {}).get("tokens_per_s", {})
        every[key] = {"tokens_per_s": {**before, **rates}, "date": date.today().isoformat()}
        draft = folder / f".rates-{os.getpid()}"
        draft.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder / "rates.json")


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "rates.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rows = found.items() if isinstance(found, dict) else ()
    return {key: row for key, row in rows if _is_measured(row)}


def _is_measured(row: Any) -> bool:
    """Whether it is what `remember` writes, and not of another hand."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("date"), str)
        and isinstance(rates := row.get("tokens_per_s"), dict)
        and all(isinstance(rate, int | float) for rate in rates.values())
    )
