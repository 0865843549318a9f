"""The report in headless Chromium: nothing runs or loads but its own, and hands can use it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, found
from reporting import Reply, Told, add_anchor, add_iteration, evaluation, new_run, some_pairs

from srlm_lite.report.facts import gather
from srlm_lite.report.html import html

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(found() is None, reason="no chromium and chromedriver here"),
]

HURT = (
    "<script>window.hurt = 1</script>",
    "<img src='http://127.0.0.1:9/x.png' onerror='window.hurt = 1'>",
    "</script><script>window.hurt = 1</script>",
    "<svg onload='window.hurt = 1'></svg>",
    "<iframe srcdoc='<script>parent.hurt = 1</script>'></iframe>",
    "<a href='javascript:window.hurt = 1' autofocus onfocus='window.hurt = 1'>click</a>",
    "]]>--><style>* { display: none }</style>",
)

CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const found = parse(getComputedStyle(node).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const low = [];
for (const node of document.querySelectorAll("body *")) {
  const svg = node.closest("svg");
  const speaks = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
  if (!speaks || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(node.tagName.toUpperCase())) continue;
  const style = getComputedStyle(node);
  const front = parse(svg ? style.fill : style.color);
  const back = behind(svg ? svg.parentElement : node);
  const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) low.push([node.tagName, node.textContent.trim().slice(0, 40), ratio]);
}
return low;
"""

LINES = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const probe = document.createElement("span");
document.body.append(probe);
const of = (name) => {
  probe.style.color = `var(${name})`;
  return light(parse(getComputedStyle(probe).color));
};
const card = of("--card");
const ratios = {};
for (let i = 1; i <= 8; i++) {
  const [a, b] = [of(`--series-${i}`), card].sort((x, y) => y - x);
  ratios[i] = (a + 0.05) / (b + 0.05);
}
return ratios;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two iterations; the second one's texts are out to do harm."""
    folder = tmp_path_factory.mktemp("report")
    run = new_run(folder / "out", f"description={json.dumps(HURT[0])}", command=HURT[2])
    add_anchor(run)
    add_iteration(run, 1, some_pairs(60), measured=evaluation(gold=2.5), drops={"tied": 4})
    harmful = [
        Told(text, Reply(text + str(i), [9.0, 8.0], text), Reply(text, [-9.0, -2.0], text))
        for i, text in enumerate(HURT)
    ]
    add_iteration(run, 2, harmful, measured=evaluation(gold=2.6))
    file = folder / "report.html"
    file.write_text(html(gather(run)), encoding="utf-8")
    return file


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def drivers(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Browsers by width and theme, each started once, the page loaded anew for each test."""
    started: dict[tuple[int, bool], Any] = {}
    contexts = []

    def opened(width: int = 1280, dark: bool = False) -> Any:
        if (width, dark) not in started:
            context = chromium(tmp_path_factory.mktemp("profile"), width=width, dark=dark)
            contexts.append(context)
            started[width, dark] = context.__enter__()
        driver = started[width, dark]
        driver.get("about:blank")
        for log in ("browser", "performance"):
            driver.get_log(log)  # of the browser's own first page, and of the test before
        driver.get(page.as_uri())
        wait_for(driver, "return document.querySelectorAll('#list > li').length > 0")
        return driver

    yield opened
    for context in contexts:
        context.__exit__(None, None, None)


def wait_for(driver: Any, script: str) -> None:
    """Until a script gives true; patiently, for the machine may be busy."""
    end = time.monotonic() + 60
    while not driver.execute_script(script):
        assert time.monotonic() < end, script
        time.sleep(0.05)


def rows(driver: Any) -> list[str]:
    """What the list shows, a line for each pair."""
    script = "return [...document.querySelectorAll('#list summary')].map((s) => s.textContent)"
    return list(driver.execute_script(script))


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def tab_to(driver: Any, selector: str) -> None:
    """Go to an element by the tabulator alone."""
    from selenium.webdriver import Keys

    for _ in range(200):
        if driver.execute_script(f"return document.activeElement.matches({json.dumps(selector)})"):
            return
        press(driver, Keys.TAB)
    raise AssertionError(f"the tabulator does not reach {selector}")


def test_it_loads_nothing_and_complains_of_nothing(drivers: Open, page: Path) -> None:
    driver = drivers()
    driver.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    wait_for(driver, "return document.querySelectorAll('#list .vote').length > 40")
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    asked = [
        message["params"]["request"]["url"]
        for entry in driver.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:,")] == [page.as_uri()]


def test_text_that_is_out_to_do_harm_does_nothing(drivers: Open) -> None:
    driver = drivers()
    driver.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    wait_for(driver, "return document.querySelectorAll('#list .vote').length > 40")
    shown = driver.execute_script("return document.getElementById('list').textContent")
    for text in HURT:
        assert text in shown  # it is there to be read
    made = "return document.querySelectorAll('#pairs img, #pairs iframe, #pairs svg, #pairs a')"
    assert driver.execute_script(f"{made}.length") == 0
    assert driver.execute_script("return document.querySelectorAll('script').length") == 2
    assert driver.execute_script("return typeof window.hurt") == "undefined"
    assert driver.get_log("browser") == []


def test_the_policy_stops_a_script_that_would_get_in(drivers: Open) -> None:
    driver = drivers()
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hurt = 1';"
        "document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
        "\"<img src=x onerror='window.hurt = 1'>\")"
    )
    time.sleep(0.3)
    assert driver.execute_script("return typeof window.hurt") == "undefined"
    told = " ".join(entry["message"] for entry in driver.get_log("browser"))
    assert "Content Security Policy" in told


def test_the_keyboard_filters_sorts_and_opens(drivers: Open) -> None:
    from selenium.webdriver import Keys

    driver = drivers()
    assert rows(driver)[0].startswith("gap 14")  # mean of 9 and 8 against that of -9 and -2
    tab_to(driver, "[name=iteration]")
    press(driver, Keys.ARROW_DOWN)  # from all to iteration 1
    wait_for(driver, "return document.getElementById('count').textContent.startsWith('60 of 67')")
    tab_to(driver, "[name=sort]")
    press(driver, Keys.ARROW_DOWN)  # narrow gaps first
    gaps = [float(row.split("iteration")[0].removeprefix("gap ")) for row in rows(driver)]
    assert len(gaps) == 25 and gaps == sorted(gaps) and gaps[0] < gaps[-1]
    tab_to(driver, "[name=apart]")
    press(driver, "2")
    wait_for(driver, "return !document.getElementById('count').textContent.startsWith('60')")
    assert all("votes apart 2" in row for row in rows(driver)) and rows(driver)
    tab_to(driver, "#list summary")
    press(driver, Keys.ENTER)
    wait_for(driver, "return document.querySelectorAll('#list .side').length === 2")
    assert driver.execute_script("return document.querySelectorAll('#list .vote').length") == 4


def test_search_reset_and_more(drivers: Open) -> None:
    from selenium.webdriver import Keys

    driver = drivers()
    tab_to(driver, "[name=text]")
    press(driver, *"onerror")
    wait_for(driver, "return document.getElementById('count').textContent.startsWith('1 of 67')")
    tab_to(driver, "button[type=reset]")
    press(driver, Keys.ENTER)
    wait_for(driver, "return document.getElementById('count').textContent.startsWith('67 of 67')")
    tab_to(driver, "#more")
    press(driver, Keys.ENTER)
    wait_for(driver, "return document.querySelectorAll('#list > li').length === 50")
    # The focus goes on to the first of the new ones, not back to the top.
    place = "return [...document.querySelectorAll('#list summary')].indexOf(document.activeElement)"
    assert driver.execute_script(place) == 25


def test_length_filters(drivers: Open) -> None:
    driver = drivers()
    script = """
    const form = document.getElementById("filters");
    form.elements.longer.value = arguments[0];
    form.elements.long_from.value = arguments[1];
    form.dispatchEvent(new Event("input", {bubbles: true}));
    """
    driver.execute_script(script, "rejected", "60")
    for row in rows(driver):
        chosen, rejected = map(int, row.split(" characters")[0].split("· ")[-1].split(" and "))
        assert rejected > chosen and rejected >= 60
    assert rows(driver)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_in_one_direction(drivers: Open, dark: bool) -> None:
    driver = drivers(360, dark)
    driver.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    wait_for(driver, "return document.querySelectorAll('#list .vote').length > 40")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 360
    small = """
    return [...document.querySelectorAll("figure svg")].map((svg) => {
      const shape = svg.viewBox.baseVal.width, shown = svg.getBoundingClientRect().width;
      return 10 * shown / shape;
    })
    """
    assert min(driver.execute_script(small)) > 8  # letters of 10 units, in pixels


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out(drivers: Open, dark: bool) -> None:
    driver = drivers(1280, dark)
    driver.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    wait_for(driver, "return document.querySelectorAll('#list .vote').length > 40")
    background = driver.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (max(background) < 64) == dark
    assert driver.execute_script(CONTRAST) == []  # WCAG AA: 4.5 for text
    assert all(ratio >= 3 for ratio in driver.execute_script(LINES).values())  # 3 for graphics


def test_everything_has_a_name(drivers: Open) -> None:
    driver = drivers()
    script = """
    const nameless = [];
    for (const field of document.querySelectorAll("input, select")) {
      if (!field.labels.length) nameless.push(field.name);
    }
    for (const region of document.querySelectorAll("svg, section, form, [role=region]")) {
      const by = region.getAttribute("aria-labelledby");
      const label = region.getAttribute("aria-label") ||
        (by && document.getElementById(by).textContent);
      if (!label) nameless.push(region.outerHTML.slice(0, 80));
    }
    return nameless;
    """
    assert driver.execute_script(script) == []
    levels = driver.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
