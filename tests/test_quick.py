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

class Together:
    def pytest_collection_finish(self, session):
        marks = [(item.path.stem, item.get_closest_marker("xdist_group")) for item in session.items]
        print("together:", *sorted({name for name, mark in marks if mark}))
        print("apart:", *sorted({name for name, mark in marks if not mark}))

for marks in ("not slow", "not model and not slow"):
    options = ("-p", "no:cacheprovider", "--collect-only", "-qq", "--quick", "-m", marks)
    assert pytest.main([sys.argv[1], *options], [Together()]) == 0
    print("\\f")
"""
"""How many tests of each file there are, as `--quick` has it, and then without those marks; whose
tests go to one process, and whose to any."""


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


def test_tests_that_share_a_fixture_of_their_file_go_to_one_process(collected: list[str]) -> None:
    told = dict(re.findall(r"^(together|apart): (.*)$", collected[0], flags=re.MULTILINE))
    together, apart = (set(told[key].split()) for key in ("together", "apart"))
    assert together and not together & apart
    assert {name.removeprefix("test_") for name in together | apart} == FILES
    for name in together | apart:
        shared = re.search(
            r'^@pytest.fixture\(.*scope="module"', (HERE / f"{name}.py").read_text(), re.M
        )
        assert (name in together) == bool(shared), name


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
