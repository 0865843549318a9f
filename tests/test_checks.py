"""Items that code can check: what is told as one, and what holds of a reply."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_lite.forms.checks import UNITS, paragraphs, read_check, sentences, words

LIST = "Three trees:\n- Oak, which is old.\n- Fir\n- Elm!\nWhich one do you like?"
NUMBERED = "1. Oak\n2) Fir"


@pytest.mark.parametrize(
    ("unit", "count"),
    # Words: 2 + 4 + 1 + 1 + 5. Sentences: "Three trees:" ends in no stop, and each line is one.
    [
        ("word", 13),
        ("sentence", 5),
        ("paragraph", 1),
        ("line", 5),
        ("bullet", 3),
        ("item", 3),
        ("character", len(LIST)),
    ],
)
def test_what_is_counted(unit: str, count: int) -> None:
    assert UNITS[unit](LIST) == count


def test_words_sentences_paragraphs() -> None:
    assert words("Don't say well-known 3.5 times -- ever") == 7  # 3 and 5
    assert sentences('One. Two!? "Three." Four (five.) six') == 5
    assert sentences("1. One\n2. Two. And more") == 3
    assert sentences("...") == 0 == sentences("")
    assert paragraphs("a\nb\n\n \n\nc\n") == 2 and paragraphs("  ") == 0
    assert UNITS["bullet"](NUMBERED) == 0 and UNITS["item"](NUMBERED) == 2


@pytest.mark.parametrize(
    ("item", "yes", "no"),
    [
        ("at least 3 bullets", LIST, "- Oak\n- Fir"),
        ("The reply has at most two sentences.", "One. Two.", "One. Two. Three."),
        ("Does the response have exactly 1 paragraph?", "a\nb", "a\n\nb"),
        ("2 to 3 words", "one two", "one"),
        ("between 2 and 3 words", "one two three", "one two three four"),
        ("list 3 items and more.", LIST, NUMBERED),
        ("3 or more words", "one two three", "one two"),
        ("fewer than 3 words", "one two", "one two three"),
        ("more than two words", "one two three", "one two"),
        ("under 5 characters", " abcd ", "abcde"),
        ("The answer must be no more than 2 lines", "a\n\nb", "a\nb\nc"),
        ("three bullet points", LIST, NUMBERED),
        ("valid JSON", '{"a": [1]}', "{a: 1}"),
        ("The reply is valid JSON.", '```json\n{"a": 1}\n```', "json"),
        ("a list", LIST, "- Oak\nand\nmore\n- Fir"),
        ("is it a numbered list?", NUMBERED, LIST),
        ("a bulleted list", "- Oak\n- Fir", NUMBERED),
        ("ends with a question", LIST, "Oak?\nYes."),
        ("Does it end with a question?", 'He asks: "Why?"', "Why? So."),
        ("written in lower case", "oak 3", "Oak 3"),
        ("all in capitals", "OAK 3", "OaK"),
        ("in capitals", "OAK", "123"),  # nothing there is a capital
        ("no commas", "oak and fir", "oak, fir"),
        ('contains "oak"', "An Oak.", "soaked"),
        ('The reply mentions the word "oak tree"', "an oak tree!", "an oak"),
        ("does not contain 'fir'", "first", "a Fir"),
        ("Does not use the words \u201cin short\u201d.", "shortly", "In short, no"),
        ('starts with "In short:"', "in short: oak", "Oak in short:"),
        ('It ends with "!"', "Oak!", "Oak! Or fir"),
    ],
)
def test_a_check(item: str, yes: str, no: str) -> None:
    check = read_check(item)
    assert check is not None
    assert check.holds(yes) and not check.holds(no)


@pytest.mark.parametrize(
    "item",
    [
        "at least 3 words about trees",
        "Is the reply about trees?",
        "is it polite",
        "the opening is good",
        "5 to 3 words",
        "at least many words",
        'contains ""',
        'contains "a" or "b" somewhere',
        "a list of trees",
        "ifeval nothing",
        "ifeval keywords:existence [1]",
        "ifeval keywords:existence {",
        "",
        "?",
    ],
)
def test_what_only_a_judge_can_tell(item: str) -> None:
    assert read_check(item) is None


def test_a_check_of_ifeval() -> None:
    pytest.importorskip("lm_eval")
    check = read_check('ifeval keywords:existence {"keywords": ["oak"]}')
    assert check is not None and check.holds("an oak") and not check.holds("a fir")


@given(st.text(max_size=300), st.text(max_size=80))
def test_any_text_can_be_read_and_checked(reply: str, item: str) -> None:
    for said in (item, f"at least 2 {item}", f'contains "{item}"', "a list", "valid JSON"):
        check = read_check(said)
        if check is not None:
            assert check.holds(reply) in (True, False)
    for count in UNITS.values():
        assert 0 <= count(reply) <= len(reply)
