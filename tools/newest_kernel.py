# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.newest_kernel RELEASE TEST...`: the module on one more kernel of Debian.

The kernel is fetched, and the module built for it, by tools/other_kernel.sh.  Where it cannot be
fetched (no network, no root, no longer in the archive) the report of pytest that is written has one
test, which was skipped with the reason: it is the machine that lacks something.  A module that does
not compile, and a test that fails, are failures.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "build" / "test" / "newest.xml"
FETCHING = ROOT / "tools" / "other_kernel.sh"
#: What the script exits with where the kernel cannot be had.
CANNOT = 4


class NotFetched(Exception):
    """The kernel cannot be had here; the text says why."""


def fetch(release: str, script: Path = FETCHING) -> Path:
    """Fetch a kernel and build the module for it.

    Args:
        release: of the kernel, as `uname -r` says it.
        script: what does it: it is called with the release, and prints the image's path last.

    Returns:
        The kernel's image.

    Raises:
        NotFetched: it cannot be had.
        subprocess.CalledProcessError: the module does not compile.
    """
    done = subprocess.run([script, release], capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode == CANNOT:
        said = [line[3:] for line in done.stderr.splitlines() if line.startswith("== ")]
        raise NotFetched(f"{release} cannot be fetched: {said[-1] if said else 'no reason given'}")
    done.check_returncode()
    return Path(done.stdout.splitlines()[-1])


def write_skipped(reason: str, report: Path) -> None:
    """Write a report that has one test, which was skipped.

    Args:
        reason: for it.
        report: where it goes; its directory is made.
    """
    suite = ElementTree.Element("testsuite", name="newest", tests="1", skipped="1")
    case = ElementTree.SubElement(suite, "testcase", classname="tests.vm", name="newest_kernel")
    ElementTree.SubElement(case, "skipped", message=reason)
    report.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suite).write(report, encoding="unicode")


def main(words: list[str]) -> int:
    """Fetch the kernel and run the tests in a guest.

    Args:
        words: the kernel's release, and what pytest is to run.

    Returns:
        The exit status: the guest's, or 0 where the kernel cannot be fetched.
    """
    release, *tests = words
    try:
        image = fetch(release)
    except NotFetched as error:
        print(f"skipped: {error}")
        write_skipped(str(error), REPORT)
        return 0
    except subprocess.CalledProcessError as error:
        return error.returncode
    REPORT.unlink(missing_ok=True)
    guest = [sys.executable, "-m", "benchmarks.guest", "--name", "newest", "--kernel", str(image)]
    pytest = ["python", "-m", "pytest", *tests, "-p", "no:cacheprovider", "-rsf"]
    report = f"--junitxml={REPORT.relative_to(ROOT)}"
    return subprocess.run([*guest, "--serial", "--", *pytest, report], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
