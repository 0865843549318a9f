"""`make quick` runs what it says: the files it names, and of them nothing that computes long."""

from __future__ import annotations

import re
from pathlib import Path

from forked import ended
from quick import FILES

HERE = Path(__file__).parent
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")


def collected(*options: str | Path) -> dict[str, int]:
    """How many tests of each file."""
    done = ended(*PYTEST, "--collect-only", "-qq", HERE, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^tests/test_(\w+)\.py: (\d+)$", done.stdout, flags=re.MULTILINE)
    return {name: int(count) for name, count in told}


def test_it_is_the_files_named_without_what_is_marked() -> None:
    quick = collected("--quick")
    assert quick.keys() == FILES
    assert quick == collected("--quick", "-m", "not model and not slow")


def test_a_test_that_takes_longer_than_its_moment_fails() -> None:
    """As if the moment were over before it began."""
    code = (
        "import sys, pytest\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import quick\n"
        "quick.MOMENT = -1.0\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[2]]))\n"
    )
    done = ended("-c", code, HERE, HERE / "test_settings.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mark it `model`" in done.stdout and not re.search(r"\d passed", done.stdout)
