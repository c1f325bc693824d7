# SPDX-License-Identifier: Apache-2.0
"""Every parser of what strangers send, fed by libFuzzer, which follows what is covered.

    make fuzz-guided FUZZ_SECONDS=3600

The parsers and what they have to keep to are those of tests.fuzzing; atheris is Python's libFuzzer.
Each target is a process of its own, since libFuzzer ends it.  What covers something new is kept in
build/fuzz, and what fails in tests/cases/fuzz, where each later run of the tests tries it first.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ["pagecache_bpf.ipc", "pagecache_bpf.templates", "pagecache_bpf.weights"]
ROOT = Path(__file__).resolve().parents[1]
LENGTH = 64 << 10


def feed(target: str, seconds: int) -> None:
    """Feed one parser in this process, which libFuzzer ends."""
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(include=PACKAGES):
        from tests import fuzzing

    found = ROOT / "build" / "fuzz" / target
    found.mkdir(parents=True, exist_ok=True)
    for data in (*fuzzing.kept(target), *fuzzing.seeds()[target]):
        (found / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def once(data: bytes) -> None:
        why = fuzzing.attempt(target, data)
        if why is not None:
            name = f"{target}-{hashlib.sha256(data).hexdigest()[:12]}.hex"
            (fuzzing.CORPUS / name).write_text(data.hex() + "\n")
            raise AssertionError(f"{name}\n{why}")

    options = [f"-max_total_time={seconds}", f"-max_len={LENGTH}", "-rss_limit_mb=4096"]
    options.append(f"-artifact_prefix={found.parent}/")
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", "-verbosity=0", str(found)], once)
    atheris.Fuzz()


def main() -> int:
    """Feed all of them, one after the other; 1 if one of them has failed."""
    from tests import fuzzing

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    options = parser.parse_args()
    failed = 0
    for target in fuzzing.TARGETS:
        seconds = max(1, options.seconds // len(fuzzing.TARGETS))
        words = ("-c", f"from tests.fuzzing_guided import feed; feed({target!r}, {seconds})")
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        runs = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"{target}: {runs[0].split()[-1] if runs else 'no'} inputs", flush=True)
        if done.returncode:
            failed += 1
            print(done.stderr[-4000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
