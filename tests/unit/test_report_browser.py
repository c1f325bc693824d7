# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: Debian's Chromium, driven through its own driver."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report_page
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.recording.format import ExpectedOrder, RecordedFile, Recording
from pagecache_bpf.recording.phases import Phase
from pagecache_bpf.reporting import page
from pagecache_bpf.reporting.grid import MAX_DETAILS
from tests.unit.recordings import MIB, TICK, load

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra: test)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    try:
        with report_page.chromium() as found:
            yield found
    except UnsupportedError as error:
        pytest.skip(f"{error.why}: {error.fix}")


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    """Open the page of recordings; it has to be ready, and nothing may have gone wrong."""

    def show(*recordings: Recording) -> Any:
        path = tmp_path / "load.html"
        path.write_text(page.page(recordings, ["first", "second"][: len(recordings)]))
        report_page.show(browser, path)
        return browser

    return show


def text_of(browser: Any, selector: str) -> str:
    """The text of an element as a person sees it."""
    return str(browser.execute_script(f"return document.querySelector('{selector}').innerText"))


def test_the_page_has_the_numbers_of_the_recording(shown: Callable[..., Any]) -> None:
    recording = load()
    recording.lost = 7
    browser = shown(recording)
    assert text_of(browser, "#title") == "tiny: first (sequential on agent)"
    summary = text_of(browser, "#summary")
    assert "12.0 MiB\nread by the load" in summary and "58.3%\nhit" in summary
    assert "7 events were lost for lack of room: the numbers are too low." in summary
    assert "41.7%\nmissed" in summary and "5.0 ms\nwaited for I/O, all readers together" in summary
    assert len(browser.execute_script("return [...document.querySelectorAll('canvas')]")) == 4


def test_hovering_tells_what_happened_there(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    # the fourth MiB of the first file, in the middle of the interval in which it was used
    where = f"report.describe(report.data.loads[0], 0.045, {3.5 * MIB})"
    told = str(browser.execute_script(f"return {where}"))
    assert "one.safetensors  3.0 MiB to 4.0 MiB  read: hit" in told
    assert "tensors: a.weight" in told and "readers here: rank0 (101)" in told
    assert "prefetched 1.0 MiB from 0.0 ms; used in time 1.0 MiB from 40.0 ms" in told
    # the same by a real pointer over the map
    box = browser.execute_script(
        "const over = document.querySelector('.u-over').getBoundingClientRect();"
        "return [over.left, over.top, over.width, over.height]"
    )
    actions = webdriver.ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(
        int(box[0] + box[2] * 0.045 / 0.15), int(box[1] + box[3] * 3.5 / 12)
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
    pointer.move_to_location(int(box[0] + box[2] * 0.005 / 0.15), middle)
    pointer.pointer_down()
    pointer.move_to_location(int(box[0] + box[2] * 0.075 / 0.15), middle)
    pointer.pointer_up()
    actions.perform()
    part = browser.execute_script(worst)
    assert [row[0] for row in part["tensors"]] == ["a.weight"]
    assert part["tensors"][0][3] == 7 * MIB
    low, high = browser.execute_script("return [report.view.x0, report.view.x1]")
    assert (low, high) == (pytest.approx(0.005, abs=0.001), pytest.approx(0.075, abs=0.001))
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
    assert len(set(ends)) == 1 and ends[0] == pytest.approx(0.43)


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


def test_a_large_load_is_drawn_in_few_strokes(shown: Callable[..., Any]) -> None:
    """1,000 shards, 100,000 tensors, 200,000 events: what is drawn depends on the screen alone.

    How long a frame takes is measured by benchmarks/report_page.py.
    """
    recording = report_page.large_recording()
    browser = shown(recording)
    assert browser.execute_script("return report.data.loads[0].tensors.count") == 100_000
    lines = browser.execute_script("return report.plots[0].bbox.height")
    columns, readers = browser.execute_script(
        "const load = report.data.loads[0]; return [load.columns, load.readers.length]"
    )
    drawn = browser.execute_script("return report.drawn")
    assert 0 < drawn["reads"] <= columns * lines
    assert 0 < drawn["stalls"] <= columns * readers
    assert 0 < drawn["ticks"] <= lines / 2 + 1
    assert 0 < drawn["template"] <= 1024 + columns
    assert 0 < drawn["window"] <= 1000 * columns
    assert drawn["names"] == 0  # far too many to be named
    # what the page holds is bounded, too: two events a part and interval, whoever read
    details = browser.execute_script("return report.data.loads[0].details.count")
    assert details <= 2 * MAX_DETAILS < len(recording.events)
    browser.execute_script("report.view.y0 = 0.5; report.view.y1 = 0.50012; report.apply()")
    drawn = browser.execute_script("return report.drawn")
    assert 10 < drawn["ticks"] == drawn["names"] < 20


def test_the_template_stands_against_the_reads(shown: Callable[..., Any]) -> None:
    follows, strays = load(), load()
    strays.expected = ExpectedOrder("mine", strays.expected.ranges[::-1].copy())
    browser = shown(follows, strays)
    cells = "return Array.from(report.data.loads[%d].template.cells)"
    # the reader is in the column and row where the template expects it, in every interval
    followed = browser.execute_script(cells % 0)
    reads = [(1 + at, at) for at in range(7)] + [(9 + at, 7 + at) for at in range(5)]
    assert list(zip(followed[::2], followed[1::2], strict=True)) == reads
    strayed = browser.execute_script(cells % 1)
    assert list(zip(strayed[::2], strayed[1::2], strict=True))[:2] == [(1, 7), (2, 8)]
    told = browser.execute_script(f"return report.describe(report.data.loads[1], 0, {3.5 * MIB})")
    assert "in the template after 8.0 MiB" in told
    assert "where the template expects the reader" in text_of(browser, "#panels")
    summary = text_of(browser, "#summary")
    # 7 MiB came 5 MiB too early, 5 MiB 7 MiB too late; within an interval nobody knows the order
    # of the cells, so that the MiB that was read in it is not counted: (7 * 4 + 5 * 6) / 12
    assert "mean distance from the template\t0 B\t4.8 MiB" in summary
    assert "Template: mine." in summary


def test_phases_stand_in_the_lane_of_who_marked_them(shown: Callable[..., Any]) -> None:
    recording = load()
    recording.phases.append(Phase(5 * TICK, "everybody", 7))  # who marked it did not read
    browser = shown(recording)
    lane = "return report.phasesOf(report.data.loads[0], report.data.loads[0].readers[%d])"
    assert [name for _, name, _ in browser.execute_script(lane % 0)] == ["weights", "everybody"]
    assert [name for _, name, _ in browser.execute_script(lane % 1)] == ["everybody"]


def test_keys_move_and_zoom(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    body = browser.find_element("tag name", "body")

    def view() -> list[float]:
        found: list[float] = browser.execute_script(
            "const { x0, x1, y0, y1 } = report.view; return [x0, x1, y0, y1]"
        )
        return found

    body.send_keys("+")
    assert view() == [pytest.approx(x) for x in (0.0375, 0.1125, 0, 1)]
    body.send_keys(webdriver.Keys.ARROW_RIGHT)
    assert view()[:2] == [pytest.approx(0.0525), pytest.approx(0.1275)]
    body.send_keys("]")
    assert view()[2:] == [0.25, 0.75]
    body.send_keys(webdriver.Keys.ARROW_DOWN)
    assert view()[2:] == [pytest.approx(0.35), pytest.approx(0.85)]
    body.send_keys("0")
    assert view() == [0, pytest.approx(0.15), 0, 1]
    body.send_keys("/")
    search = browser.find_element("id", "search")
    assert browser.switch_to.active_element == search
    search.send_keys("b.weight", webdriver.Keys.ENTER)  # 5 of 12 MiB, and as much around it
    assert view()[2:] == [pytest.approx(2 / 12), 1]


def test_dark_and_light_and_paper(shown: Callable[..., Any]) -> None:
    browser = shown(load())
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(ground)
    browser.find_element("id", "theme").click()
    assert browser.execute_script(ground) != light
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(ground) == light
    for hidden in (".tools", "#hover", "footer"):
        assert not browser.find_element("css selector", hidden).is_displayed()
    # on A4 across, with margins of 12 mm, a panel is not cut off
    widths = browser.execute_script("return report.plots.map((plot) => plot.width)")
    assert set(widths) == {1000} and 1000 < (297 - 24) / 25.4 * 96
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert browser.execute_script(ground) != light
    assert browser.execute_script("return report.plots[0].width") > 1000
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")
