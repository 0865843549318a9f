"""`srlm-lite data show`: what is in a data directory, counted by hand beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, found
from commands import Cli
from messages import Told

from srlm_lite.data.text import THOUGHT_OPENINGS
from srlm_lite.dataview import figures as figures_module
from srlm_lite.dataview.figures import DRAWN, Figures, FileFigures, figures_of
from srlm_lite.dataview.languages import UNTOLD, language
from srlm_lite.dataview.standing import findings
from srlm_lite.dataview.tokens import RecipeTokens
from srlm_lite.errors import UserError
from srlm_lite.recipe import load_recipe, overridden

Rows = Sequence[Mapping[str, Any]]


def write(folder: Path, **files: Rows) -> Path:
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def answer(number: int, prompt: str = "", response: str = "", **more: Any) -> dict[str, Any]:
    texts = {"prompt": prompt or f"Question {number}?", "response": response or f"Reply {number}."}
    return {"prompt_id": f"p{number}", **texts, **more}


def reply(prompt: int, rank: int, length: int, **more: Any) -> dict[str, Any]:
    """A ranked reply of some length."""
    name = f"p{prompt}-{rank}-{length}"
    text = (name + " x" * length)[:length]
    return {
        "prompt_id": f"p{prompt}",
        "prompt": f"Ranked question {prompt}?",
        "response_id": name,
        "response": text,
        "rank": rank,
        **more,
    }


def seen(folder: Path) -> tuple[Figures, dict[str, FileFigures]]:
    figures = figures_of(folder)
    return figures, {one.file.stem: one for one in figures.files}


def lines(folder: Path) -> list[str]:
    """What stands out."""
    return [f"{one.level}: {one.text}" for one in findings(figures_of(folder), {})]


def test_rows_lengths_and_repetition_are_counted(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    rows = [
        answer(1, "What is tea?", "x" * 10),
        answer(2, "what  IS tea", "y" * 30),
        answer(3, "Why?", "X" * 10),
        {"prompt_id": "p4", "messages": talk, "response": "z" * 20},
    ]
    _, files = seen(write(tmp_path, ift=rows))
    ift = files["ift"]
    assert (ift.rows, ift.prompts, ift.conversations, ift.systems) == (4, 4, 1, 1)
    assert ift.same_prompts.rows == 1 and ift.same_replies.rows == 1
    assert [str(place) for place in ift.same_prompts.first or ()] == ["ift.jsonl:2", "ift.jsonl:1"]
    assert [str(place) for place in ift.same_replies.first or ()] == ["ift.jsonl:3", "ift.jsonl:1"]
    spread = ift.reply_chars
    assert spread is not None
    assert (spread.mean, spread.median, spread.longest) == (17.5, 15, 30)  # of 10, 30, 10, 20
    assert str(spread.longest_at) == "ift.jsonl:2"
    assert sum(count for *_, count in spread.bins) == 4


def test_the_order_of_replies_is_counted_by_prompt(tmp_path: Path) -> None:
    """Four prompts, one of each kind, with the arithmetic beside each figure."""
    rows = [
        reply(1, 0, 40, quality=0.9),
        reply(1, 1, 20, quality=0.5),
        reply(1, 1, 40, quality=0.5),
        reply(2, 0, 20, quality=0.1),
        reply(3, 0, 30),
        reply(3, 0, 25),
        reply(4, 0, 20, quality=0.2),
        reply(4, 1, 30, quality=0.8),
    ]
    _, files = seen(write(tmp_path, eft_train=rows))
    order = files["eft_train"].order
    assert order is not None
    # Prompts 1 and 4 are ordered, 2 has one reply, 3 is tied.
    assert (order.ordered, order.single, order.tied) == (2, 1, 1)
    assert order.replies == (1, 2.0, 3) and order.qualities == 6
    # Pairs: 3 of prompt 1 (one of them tied), 1 of prompt 3 (tied), 1 of prompt 4.
    assert (order.pairs, order.tied_pairs) == (5, 2)
    # In order: 40 against 20 is won, 40 against 40 is half, 20 against 30 is lost: 1.5 of 3.
    assert order.longer_wins is not None and order.longer_wins.value == 0.5
    assert order.upside_down == 1 and str(order.upside_down_at) == "eft_train.jsonl:7"
    assert order.scores == (
        (0.1, 0.1, 1),
        (0.2, 0.2, 1),
        (0.5, 0.5, 2),
        (0.8, 0.8, 1),
        (0.9, 0.9, 1),
    )


@pytest.mark.parametrize(("better", "told"), [(60, "longer is better"), (10, "shorter is better")])
def test_an_order_that_length_decides_is_a_warning(tmp_path: Path, better: int, told: str) -> None:
    rows = [reply(n, rank, (better, 30)[rank]) for n in range(40) for rank in (0, 1)]
    [line] = lines(write(tmp_path, eft_train=rows))
    assert line.startswith("warning: in eft_train.jsonl") and told in line
    fair = [reply(n, rank, 30 + 20 * (rank == n % 2)) for n in range(40) for rank in (0, 1)]
    assert lines(write(tmp_path, eft_train=fair)) == []


def test_thoughts_stand_out_unless_the_base_thinks(tmp_path: Path) -> None:
    rows = [answer(0), answer(1, response="<think>Hm.</think> Yes."), answer(2, response="<b>")]
    write(tmp_path, ift=rows)
    told = "warning: 1 reply in ift.jsonl begins with a thought, the first at ift.jsonl:2: a base "
    assert next(line for line in lines(tmp_path) if "thought" in line).startswith(told)
    figures, by_file = seen(tmp_path)
    assert (by_file["ift"].thoughts, str(by_file["ift"].thoughts_at)) == (1, "ift.jsonl:2")
    assert not any("thought" in one.text for one in findings(replace(figures, thinks=True), {}))


def test_thoughts_are_known_by_the_marks_of_every_maker() -> None:
    from srlm_lite.model.template import _THOUGHTS

    assert {one.marks[0] for one in _THOUGHTS} == set(THOUGHT_OPENINGS)


def test_held_out_prompts_that_are_learned_stand_out(tmp_path: Path) -> None:
    held = [reply(n, rank, 30) for n in range(40) for rank in (0, 1)]
    ift = [answer(1, "Ranked question 3?"), answer(2, "ranked QUESTION, 4"), answer(3)]
    found = lines(write(tmp_path, eft_eval=held, ift=ift))
    assert [line.partition(":")[0] for line in found] == ["refused", "warning"]
    assert "1 prompt of it is in ift.jsonl, too; the first stands in eft_eval.jsonl:7" in found[0]
    assert "1 prompt of it is in ift.jsonl in the same words" in found[1]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"ift": []}, "ift.jsonl is empty"),
        ({"ift": [answer(1, response=" ")]}, "1 row of ift.jsonl has no text to answer"),
        ({"prompts": [{"prompt_id": "a", "text": "x"}] * 2}, "a prompt_id of prompts.jsonl stands"),
        ({"eft_train": [reply(1, 0, 9), reply(1, 0, 9)]}, "a response_id of eft_train.jsonl"),
        (
            {"eft_train": [reply(1, 0, 9), {**reply(1, 1, 8), "prompt": "Other?"}]},
            "a prompt id of eft_train.jsonl stands for two prompts, in eft_train.jsonl:1 and",
        ),
    ],
)
def test_what_a_run_would_refuse_stands_out(
    tmp_path: Path, files: dict[str, Rows], told: str
) -> None:
    assert any(line.startswith(f"refused: {told}") for line in lines(write(tmp_path, **files)))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"prompt_id": "a", "prompt": "x"}',
        '{"prompt_id": "a", "prompt": "x", "response": 3}',
        '{"prompt_id": "a", "prompt": "x", "response": "\\ud800"}',
        '{"prompt_id": "a", "response": "y", "messages": [{"role": "user"}]}',
        '{"prompt_id": "a", "response": "y", "messages": [{"role": "assistant", "content": "z"}]}',
    ],
    ids=["no JSON", "no object", "no reply", "a number", "half a letter", "no turns", "no user"],
)
def test_a_broken_row_is_one_line_with_its_place(
    tmp_path: Path, cli: Cli, told: Told, line: str
) -> None:
    write(tmp_path, ift=[answer(1)])
    with (tmp_path / "ift.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    done = cli("data", "show", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ift.jsonl:3: " in done.stderr
    told(done.stderr.strip())


def test_other_directories_and_options_are_refused(tmp_path: Path, cli: Cli, told: Told) -> None:
    (tmp_path / "data").mkdir()
    data = write(tmp_path / "data", ift=[answer(1)])
    for args in (
        [tmp_path / "nowhere"],
        [tmp_path],
        [data / "ift.jsonl"],
        [data, "--set", "base.window=9"],
        [data, "--base", "x", "--recipe", "toy"],
        [data, "--html", data / "ift.jsonl"],
    ):
        done = cli("data", "show", *args)
        assert (done.returncode, done.stdout) == (2, "")
        told(done.stderr.strip())


def test_bytes_that_are_no_text_are_told_by_their_line(tmp_path: Path) -> None:
    write(tmp_path, ift=[answer(1)])
    with (tmp_path / "ift.jsonl").open("ab") as file:
        file.write(b'{"prompt_id": "\xff"}\n')
    with pytest.raises(UserError, match=r"ift\.jsonl:2: not UTF-8 text"):
        figures_of(tmp_path)


def test_drawn_prompts_come_with_all_their_rows_and_are_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures_module, "DRAWN", 5)
    rows = [reply(n, rank, 30 + rank) for rank in (0, 1, 2) for n in range(50)]  # not in groups
    _, files = seen(write(tmp_path, eft_train=rows))
    drawn = files["eft_train"].drawn
    assert len(drawn) == 5 and all([row.rank for row in group] == [0, 1, 2] for group in drawn)
    assert seen(write(tmp_path, eft_train=rows))[1]["eft_train"].drawn == drawn
    assert {group[0].prompt_id for group in drawn} != {f"p{n}" for n in range(5)}
    assert DRAWN > 5


def test_languages_are_told_where_they_can_be() -> None:
    assert language("How do I look after a bicycle in the winter?") == "en"
    assert language("Wie pflege ich mein Fahrrad im Winter am besten?") == "de"
    assert (
        language("Как лучше всего ухаживать за велосипедом зимой, когда на дорогах соль?") == "ru"
    )
    assert language("42") == language("") == UNTOLD


def test_tokens_are_those_of_the_base_and_its_template(tmp_path: Path, tiny_base_dir: Path) -> None:
    """The ids are those that a run renders; the window is the recipe's."""
    write(
        tmp_path,
        ift=[answer(1, "Hi", "a b c"), answer(2, "Hi", "word " * 40)],
        prompts=[{"prompt_id": "1", "text": "Hi"}],
        eft_eval=[reply(1, 0, 30)],
    )
    raw = {"name": "t", "base": {"name": str(tiny_base_dir), "window": 200}, "data": {"dir": "x"}}
    recipe = overridden(raw, ["rollout.max_new_tokens=150"], where="test")
    tokens = RecipeTokens(recipe)
    files = {one.file.stem: one for one in figures_of(tmp_path, tokens).files}
    prompt = len(tokens._chat.prompt_ids("Hi"))
    spread = files["prompts"].prompt_tokens
    assert spread is not None and spread.longest == prompt
    both = [prompt + len(tokens._chat.target_ids(text)) for text in ("a b c", "word " * 40)]
    assert files["ift"].beyond == sum(length > 200 for length in both)
    assert files["prompts"].beyond == (prompt + 150 > 200)
    assert files["eft_eval"].beyond == 1  # the rubric alone is longer
    assert any(
        "do not fit 200 tokens" in line.text for line in findings(figures_of(tmp_path, tokens), {})
    )


def test_the_shipped_data_has_nothing_that_a_run_refuses(cli: Cli) -> None:
    """And the terminal shows it in 80 columns."""
    done = cli("data", "show", load_recipe("toy").data.dir)
    assert done.returncode == 0 and "refuses" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"^ ift +\d+ +\d+", done.stdout, re.MULTILINE)


HURT = "</p><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"


@pytest.fixture
def page(tmp_path: Path, cli: Cli) -> Path:
    talk = [{"role": "user", "content": HURT}, {"role": "assistant", "content": "A"}]
    talk.append({"role": "user", "content": f"last {HURT}"})
    write(
        tmp_path,
        ift=[{"prompt_id": "p1", "messages": talk, "response": HURT}],
        eft_train=[reply(1, 0, 40, quality=2.0, target=HURT), reply(1, 1, 20, quality=1.0)],
    )
    out = tmp_path / "data.html"
    done = cli("data", "show", tmp_path, "--html", out, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["files"][0]["rows"] == 1
    return out


def test_the_page_shows_samples_and_has_no_script(page: Path, cli: Cli) -> None:
    text = page.read_text(encoding="utf-8")
    assert (
        "<script" not in text
        and "onerror='" not in text
        and "http://" not in text.replace("http://www.w3.org", "")
    )
    assert "script-src" not in text and "default-src &#39;none&#39;" in text
    assert text.count("<h4>The user</h4>") == 3 and "<h4>The assistant</h4>" in text
    assert "Rank 0" in text and "quality 2, 40 characters" in text
    assert cli("data", "show", page.parent, "--html", page).returncode == 0  # replaces its own


@pytest.mark.browser
@pytest.mark.skipif(found() is None, reason="no chromium and chromedriver here")
def test_the_page_is_inert_in_a_browser(page: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", width=360) as driver:
        driver.get(page.as_uri())
        driver.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
        assert HURT in driver.execute_script("return document.body.textContent")
        assert driver.execute_script("return typeof window.hurt") == "undefined"
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        assert driver.get_log("browser") == []
        asked = [
            message["params"]["request"]["url"]
            for entry in driver.get_log("performance")
            if (message := json.loads(entry["message"])["message"])["method"]
            == "Network.requestWillBeSent"
        ]
        assert [url for url in asked if url.startswith("http")] == []
