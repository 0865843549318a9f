"""Installed versions against the ranges that srlm-lite declares and the versions it is tested with.

The ranges are in the package's own metadata. The tested versions are `constraints.txt`, which
travels in the wheel as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from srlm_lite.doctor.finding import Finding
from srlm_lite.engines import ENGINES
from srlm_lite.tracking import TRACKERS

CONSTRAINTS = "constraints.txt"


@dataclass(frozen=True, slots=True)
class Extra:
    """A library that is not needed by all: its extra, its module, the packages that may bring it,
    and what it is for."""

    name: str
    extra: str
    module: str
    packages: tuple[str, ...]
    use: str


EXTRAS = (
    *(
        Extra(kind.package, kind.package, kind.package, kind.distributions, f"engine {kind.name}")
        for kind in ENGINES.values()
        if kind.package is not None
    ),
    Extra("unsloth", "unsloth", "unsloth", ("unsloth",), "base.backend=unsloth"),
    Extra("eval", "eval", "lm_eval", ("lm-eval",), "standard benchmarks"),
    *(Extra(name, "tracking", name, (name,), "tracking.report_to") for name in TRACKERS),
)

IMPORTED = ("torch", "transformers", "peft", "trl", "bitsandbytes")
"""Imported, not only looked up: a version that does not start is no use."""


def constraints_file() -> Path:
    """The tested versions: inside an installed package, or of a checkout."""
    packaged = Path(str(resources.files("srlm_lite"))) / CONSTRAINTS
    return packaged if packaged.is_file() else packaged.parent.parent / CONSTRAINTS


def tested_versions(file: Path | None = None) -> dict[str, str]:
    """Package, by its canonical name, to the version that the tests ran with."""
    tested: dict[str, str] = {}
    for line in (file or constraints_file()).read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("#")[0].strip().partition("==")
        if equals:
            tested[canonicalize_name(name)] = version
    return tested


def declared() -> list[Requirement]:
    """What the package needs, without its extras."""
    lines = metadata.requires("srlm-lite") or []
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def installed_version(name: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_findings(
    requirements: list[Requirement] | None = None, tested: dict[str, str] | None = None
) -> list[Finding]:
    """One finding for all packages as tested, and one for each that is not."""
    requirements = declared() if requirements is None else requirements
    tested = tested_versions() if tested is None else tested
    as_tested: list[str] = []
    versions: dict[str, object] = {}
    findings = []
    for requirement in requirements:
        name = requirement.name
        pin = tested.get(canonicalize_name(name))
        version = versions[name] = installed_version(name)
        pinned = f"pip install '{name}=={pin}'" if pin else f"pip install '{requirement}'"
        facts: dict[str, object] = {"installed": version, "tested": pin}
        if version is None:
            findings.append(Finding("bad", name, "not installed", pinned, facts))
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{version} is outside {requirement.specifier}"
            findings.append(Finding("bad", name, text, pinned, facts))
        elif pin is None or Version(version).public != pin:
            text = f"{version}, tested with {pin or 'no version'}"
            findings.append(Finding("warning", name, text, pinned if pin else None, facts))
        else:
            as_tested.append(f"{name} {version}" if name in IMPORTED else name)
    findings += [finding for name in IMPORTED if (finding := _start(name)) is not None]
    # The ones that compute, by version; the others would fill the screen.
    shown = [each for each in as_tested if " " in each]
    text = ", ".join(shown) + f" and {len(as_tested) - len(shown)} more, as tested"
    summary = [Finding("ok", "versions", text, facts=versions)] if as_tested else []
    return summary + findings


def _start(module: str) -> Finding | None:
    """Import a library; a finding if it fails."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library fails in whatever way it likes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        odd = [m for m in ("torchvision", "torchaudio", "torchcodec") if m in str(error)]
        way_out = f"pip uninstall {' '.join(odd)}" if odd else f"pip install --force {module}"
        return Finding("bad", module, f"cannot be imported: {first[:160]}", way_out)
    return None


def extra_findings() -> list[Finding]:
    """Which extras are here, and what each would be for."""
    tested = tested_versions()
    findings = []
    for extra in EXTRAS:
        found = [(name, installed_version(name)) for name in extra.packages]
        here = next(((name, version) for name, version in found if version), None)
        if importlib.util.find_spec(extra.module) is None or here is None:
            way_out = f"pip install 'srlm-lite[{extra.extra}]'"
            text = f"not installed ({extra.use})"
            findings.append(Finding("absent", extra.name, text, way_out))
            continue
        name, version = here
        pin = tested.get(name)
        same = Version(version or "0").public == pin
        text = f"{name} {version} ({extra.use})" + ("" if same else f", tested with {pin}")
        findings.append(Finding("ok" if same else "warning", extra.name, text))
    return findings


def python_finding() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    text = f"{version} on {platform.system()} {platform.machine()}"
    return Finding("ok", "Python", text)
