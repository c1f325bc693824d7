# SPDX-License-Identifier: Apache-2.0
"""How large a report's page gets, and how fluent it is in a real browser.

The load is as large as loads get: 1,000 shards of 700 MiB with 100,000 tensors, eight readers with
stalls, a policy's window, a template.  Chromium, without an accelerator, zooms and moves through
its page; each frame's time is the browser's own: from the start of a frame to the message that it
delivers after painting, and the frames beyond 50 ms of its long-animation-frame observer.  The same
for the tables and for the search.  Writes build/bench/report_page.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import hosted
from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.recording.format import (
    EVENT,
    EXPECTED,
    ExpectedOrder,
    RecordedFile,
    RecordedTensor,
    Recording,
    Sample,
)
from pagecache_bpf.recording.phases import Phase
from pagecache_bpf.recording.recorder import MAX_EVENTS
from pagecache_bpf.reporting import page

_MIB = 1 << 20
SHARDS, TENSORS_A_SHARD, READERS = 1000, 100, 8
_SHARD = 700 * _MIB
_TICKS = 30_000

#: Pans and zooms through the load, a step a frame; answers with the milliseconds of each frame, and
#: with those that the browser counts as long.
_FRAMES = """
const done = arguments[arguments.length - 1], count = arguments[0], times = [], long = [];
new PerformanceObserver((list) => long.push(...list.getEntries().map((one) => one.duration)))
  .observe({ type: "long-animation-frame" });
const { view } = report, whole = view.x1;
const step = () => {
  const begun = performance.now(), at = times.length / count;
  const size = 0.2 + 0.8 * Math.abs(Math.cos(Math.PI * at));  // from all of it to a fifth, and back
  view.x0 = at * (1 - size) * whole;
  view.x1 = view.x0 + size * whole;
  view.y0 = at * (1 - size);
  view.y1 = view.y0 + size;
  report.apply();
  const painted = new MessageChannel();
  painted.port1.onmessage = () => {
    times.push(performance.now() - begun);
    if (times.length < count) requestAnimationFrame(step);
    else setTimeout(() => { report.reset(); done({ times, long }); }, 100);
  };
  painted.port2.postMessage(null);
};
requestAnimationFrame(step);
"""
_TABLES = """
const begun = performance.now();
report.worst(report.data.loads[0]);
return performance.now() - begun;
"""


def large_recording() -> Recording:
    """Return the largest load that a page is to show; the same each time."""
    rng = np.random.default_rng(7)
    cell, count = _MIB, MAX_EVENTS
    table = np.zeros(count, EVENT)
    place = np.sort(rng.integers(SHARDS * (_SHARD // cell), size=count))
    table["file"], table["cell"] = np.divmod(place, _SHARD // cell)
    late = rng.random(count) < 0.2
    table["tick"] = np.sort(rng.integers(_TICKS, size=count))
    table["tgid"] = 1 + rng.integers(READERS, size=count)
    table["useful_bytes"] = np.where(late, 0, cell)
    table["late_bytes"] = np.where(late, cell, 0)
    table["stall_ns"] = np.where(late, rng.integers(1, 10_000_000, size=count), 0)
    ahead = table.copy()
    for name in ("useful_bytes", "late_bytes", "stall_ns", "tgid"):
        ahead[name] = 0
    ahead["tick"] = np.maximum(0, ahead["tick"] - 150)
    ahead["prefetched_bytes"] = cell
    events = np.concatenate([ahead[::2], table[::2]])
    events = events[np.argsort(events["tick"], kind="stable")]
    expected = np.zeros(SHARDS, EXPECTED)
    expected["file"], expected["bytes"] = np.arange(SHARDS), _SHARD
    tick_ns = 10_000_000
    return Recording(
        model="a large one",
        policy="maio",
        engine="agent",
        kernel="6.18.0",
        started_ns=1_700_000_000_000_000_000,
        seconds=_TICKS * tick_ns / 1e9,
        tick_ns=tick_ns,
        cell_bytes=cell,
        files=[
            RecordedFile(f"/m/model-{number:05}-of-{SHARDS:05}.safetensors", _SHARD)
            for number in range(SHARDS)
        ],
        tensors=[
            RecordedTensor(
                file, f"model.layers.{file}.mlp.experts.{at}.w1.weight", at * 7 * _MIB, 7 * _MIB
            )
            for file in range(SHARDS)
            for at in range(TENSORS_A_SHARD)
        ],
        readers={number: f"rank{number}" for number in range(1, READERS + 1)},
        events=events,
        samples=[Sample(at * 10 * tick_ns, at * 250 * _MIB, 8 << 30) for at in range(_TICKS // 10)],
        phases=[Phase(0, "model", 1), Phase(_TICKS * tick_ns // 9, "weights", 1)],
        device="8:0",
        device_limit=3e9,
        expected=ExpectedOrder("derived: safetensors keys", expected),
    )


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Debian's Chromium without a window, driven by Selenium.

    Raises:
        UnsupportedError: the browser, its driver or Selenium is missing.
    """
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        paths = None, None
    if None in paths:
        raise UnsupportedError(
            "there is no browser to look at pages with",
            "Chromium, its driver or the Python package selenium is missing",
            "apt install chromium chromium-driver; pip install selenium",
        )
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=str(paths[1]))
    with webdriver.Chrome(options=options, service=service) as found:
        found.set_page_load_timeout(120)
        found.set_script_timeout(120)
        yield found


def show(browser: Any, path: Path) -> None:
    """Open a page and wait until its script has drawn it.

    Args:
        browser: what chromium() gives.
        path: the page.

    Raises:
        PagecacheError: something went wrong in it.
    """
    browser.get(path.as_uri())
    deadline = time.monotonic() + 120
    while browser.execute_script("return document.documentElement.dataset.ready") != "yes":
        if time.monotonic() > deadline:
            raise PagecacheError(f"{path} does not get ready", str(browser.get_log("browser")))
        time.sleep(0.05)
    wrong = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    if wrong:
        raise PagecacheError(f"{path} has errors", "; ".join(wrong))


def main() -> int:
    """Make the page, move through it, print what the browser says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_page", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--frames", type=int, default=120, help="default: 120")
    parser.add_argument("--out", type=Path, default=hosted.BUILD / "bench" / "report_page.json")
    options = parser.parse_args()
    begun = time.perf_counter()
    recording = large_recording()
    made = time.perf_counter()
    text = page.page([recording], ["large"])
    found: dict[str, Any] = {
        "page_bytes": len(text.encode()),
        "making_s": time.perf_counter() - made,
        "recording_s": made - begun,
    }
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        path = Path(directory) / "large.html"
        path.write_text(text)
        begun = time.perf_counter()
        show(browser, path)
        found["opening_s"] = time.perf_counter() - begun
        browser.execute_async_script(_FRAMES, 20)  # warm
        answer = browser.execute_async_script(_FRAMES, options.frames)
        times = sorted(answer["times"])
        found["frame_ms"] = {
            "median": statistics.median(times),
            "p95": times[int(0.95 * (len(times) - 1))],
            "max": times[-1],
            "frames": len(times),
            "over_50_ms_by_observer": len(answer["long"]),
        }
        found["tables_ms"] = statistics.median(browser.execute_script(_TABLES) for _ in range(9))
        found["drawn"] = browser.execute_script("return report.drawn")
        found["browser"] = browser.capabilities["browserVersion"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PagecacheError as error:
        sys.exit(str(error))
