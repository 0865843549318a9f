"""`make quick` runs what it says: the files it names, and of them nothing that computes long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import ended
from quick import FILES

HERE = Path(__file__).parent


COLLECT = """
import sys, pytest

for marks in ("not slow", "not model and not slow"):
    options = ("-p", "no:cacheprovider", "--collect-only", "-qq", "--quick", "-m", marks)
    assert pytest.main([sys.argv[1], *options]) == 0
    print("\\f")
"""
"""How many tests of each file there are, as `make quick` has it, and then without those marks."""

ONE_OF_A_FILE = """
import os, pytest
from pathlib import Path

@pytest.mark.parametrize("number", range(6))
def test_it(number):
    (Path(__file__).parent / f"{Path(__file__).stem}-{os.environ['PYTEST_XDIST_WORKER']}").touch()
"""


@pytest.fixture(scope="module")
def collected() -> list[str]:
    done = ended("-c", COLLECT, HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\f")


def test_it_is_the_files_named_without_what_is_marked(collected: list[str]) -> None:
    quick, unmarked = (
        dict(re.findall(r"^tests/test_(\w+)\.py: (\d+)$", said, flags=re.MULTILINE))
        for said in collected[:2]
    )
    assert quick.keys() == FILES
    assert quick == unmarked


def test_the_tests_of_a_file_run_in_one_process(tmp_path: Path) -> None:
    """By the options of the Makefile. pytest 9.2 does not see the groups of pytest-xdist 3.8."""
    options = re.search(r"-m pytest -n \S+ (.*)", (HERE.parent / "Makefile").read_text())
    assert options
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text(ONE_OF_A_FILE)
    done = ended("-m", "pytest", "-n", "2", *options[1].split(), "-p", "no:cacheprovider", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = sorted(path.name.split("-") for path in tmp_path.glob("test_?-*"))
    assert [file for file, _ in seen] == ["test_a", "test_b", "test_c", "test_d"]
    assert len({process for _, process in seen}) == 2


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
