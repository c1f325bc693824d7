# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: Debian's Chromium, driven through its own driver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagecache_bpf.recording.format import EVENT, RecordedFile, RecordedTensor, Recording
from pagecache_bpf.reporting import page
from tests.unit.recordings import MIB, load

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra: test)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as found:
        found.set_page_load_timeout(120)
        yield found


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    """Open the page of recordings; it has to be ready, and nothing may have gone wrong."""

    def show(*recordings: Recording) -> Any:
        path = tmp_path / "load.html"
        path.write_text(page.page(recordings, ["first", "second"][: len(recordings)]))
        browser.get(path.as_uri())
        deadline = time.monotonic() + 120
        while browser.execute_script("return document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < deadline, browser.get_log("browser")
            time.sleep(0.05)
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
        return browser

    return show


def text_of(browser: Any, selector: str) -> str:
    """The text of an element as a person sees it."""
    return str(browser.execute_script(f"return document.querySelector('{selector}').innerText"))


def test_the_page_has_the_numbers_of_the_recording(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    assert text_of(browser, "#title") == "tiny: first (sequential on agent)"
    summary = text_of(browser, "#summary")
    assert "12.0 MiB\naccessed" in summary and "58.3%\nhit" in summary
    assert "41.7%\nmissed" in summary and "5.0 ms\nstalled, all readers" in summary
    assert len(browser.execute_script("return [...document.querySelectorAll('canvas')]")) == 4


def test_hovering_tells_what_happened_there(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    # the fourth MiB of the first file, in the middle of the interval in which it was used
    where = f"report.describe(report.data.loads[0], 0.065, {3.5 * MIB})"
    told = str(browser.execute_script(f"return {where}"))
    assert "one.safetensors  3.0 MiB to 4.0 MiB  read: hit" in told
    assert "tensors: a.weight" in told and "readers here: rank0 (101)" in told
    assert "prefetched 1.0 MiB from 20.0 ms; used in time 1.0 MiB from 60.0 ms" in told
    # the same by a real pointer over the map
    box = browser.execute_script(
        "const over = document.querySelector('.u-over').getBoundingClientRect();"
        "return [over.left, over.top, over.width, over.height]"
    )
    actions = webdriver.ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(
        int(box[0] + box[2] * 0.065 / 0.17), int(box[1] + box[3] * 3.5 / 12)
    )
    actions.perform()
    assert "read: hit" in text_of(browser, "#hover")


def test_selecting_a_range_lists_what_waited_in_it(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    worst = "return report.worst(report.data.loads[0])"
    whole = browser.execute_script(worst)
    assert [row[0] for row in whole["tensors"]] == ["b.weight", "a.weight"]
    assert whole["tensors"][0][1] == pytest.approx(5 * 0.001000003, rel=1e-5)
    assert whole["tensors"][0][2:] == [5 * MIB, 5 * MIB]
    assert [row[0] for row in whole["readers"]] == ["rank1 (103)", "rank0 (101)"]
    box = browser.execute_script(
        "const over = document.querySelector('.u-over').getBoundingClientRect();"
        "return [over.left, over.top, over.width, over.height]"
    )
    actions = webdriver.ActionChains(browser)
    pointer = actions.w3c_actions.pointer_action
    middle = int(box[1] + box[3] * 0.5)
    pointer.move_to_location(int(box[0] + box[2] * 0.025 / 0.17), middle)
    pointer.pointer_down()
    pointer.move_to_location(int(box[0] + box[2] * 0.095 / 0.17), middle)
    pointer.pointer_up()
    actions.perform()
    part = browser.execute_script(worst)
    assert [row[0] for row in part["tensors"]] == ["a.weight"]
    assert part["tensors"][0][3] == 7 * MIB
    low, high = browser.execute_script("return [report.view.x0, report.view.x1]")
    assert (low, high) == (pytest.approx(0.025, abs=0.001), pytest.approx(0.095, abs=0.001))
    browser.find_element("tag name", "body").send_keys("0")
    assert browser.execute_script(worst) == whole


def test_a_tensor_is_found_by_its_name(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    browser.find_element("id", "search").send_keys("b.wei")
    assert text_of(browser, "#hover").startswith("b.weight: 5.0 MiB")
    browser.find_element("id", "search").send_keys("nothing")
    assert "no tensor has" in text_of(browser, "#hover")


def test_two_loads_stand_on_one_axis(shown: Callable[..., Any]) -> None:
    slow = load()
    slow.policy = ""
    slow.events = slow.events.copy()
    slow.events["tick"] *= 3
    browser = shown(load(), slow)
    assert "first (sequential on agent) against second (the kernel's default)" in text_of(
        browser, "#title"
    )
    ends = browser.execute_script("return report.plots.map((plot) => plot.scales.x.max)")
    assert len(set(ends)) == 1 and ends[0] == pytest.approx(0.49)


def test_names_are_shown_as_text(shown: Callable[..., Any]) -> None:
    hostile = "<img src=x onerror='window.owned=1'></script><b>\x1b[31m"
    recording = load((hostile, "b"))
    recording.model = recording.command = hostile
    recording.files[0] = RecordedFile("/m/" + hostile, 7 * MIB)
    recording.readers = {101: hostile[:15], 103: hostile[:15]}
    browser = shown(recording)
    browser.execute_script("report.apply()")
    assert browser.execute_script("return window.owned") is None
    assert (
        browser.execute_script("return document.querySelectorAll('main img, main b b').length") == 0
    )
    assert "<img src=x" in text_of(browser, "#tables")
    assert "\x1b" not in text_of(browser, "body")


def test_a_large_load_stays_fluent(shown: Callable[..., Any]) -> None:
    """1,000 shards, 100,000 tensors: a redraw by the browser's own clock, the best of several."""
    rng = np.random.default_rng(7)
    table = np.zeros(100_000, EVENT)
    table["file"] = np.sort(rng.integers(1000, size=len(table)))
    table["cell"] = rng.integers(700, size=len(table))
    table["tick"] = np.sort(rng.integers(30_000, size=len(table)))
    table["tgid"] = 1 + rng.integers(8, size=len(table))
    table["useful_bytes"] = MIB
    recording = replace(
        load(),
        files=[RecordedFile(f"/m/{number:05}", 700 * MIB) for number in range(1000)],
        tensors=[
            RecordedTensor(file, f"layers.{file}.experts.{at}", at * 7 * MIB, 7 * MIB)
            for file in range(1000)
            for at in range(100)
        ],
        readers={number: f"rank{number}" for number in range(1, 9)},
        events=table,
    )
    browser = shown(recording)
    assert browser.execute_script("return report.data.loads[0].tensors.count") == 100_000
    drawn = "return Array.from({length: 9}, () => report.apply())"
    times = browser.execute_script(drawn)
    print("milliseconds of a redraw:", sorted(round(time, 1) for time in times))
    assert all(time > 0 for time in times)
