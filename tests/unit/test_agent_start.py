# SPDX-License-Identifier: Apache-2.0
"""What an agent takes over from the process that starts it: nothing that is not meant for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from pagecache_bpf.policy.agent_device import environment
from tests.unit.command import ROOT

INHERIT = """
import json, os, resource, signal, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.setpriority(os.PRIO_PROCESS, 0, 5)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.umask(0)
before = os.sched_getaffinity(0)
from pagecache_bpf.controller.inherited import reset
failed = reset()
print(json.dumps([len(before), len(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0),
                  [int(blocked) for blocked in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
                  os.umask(0), failed]))
"""


def test_scheduling_signals_and_mask_are_the_machines_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INHERIT], capture_output=True, text=True, cwd=ROOT, check=True
    )
    before, cpus, priority, blocked, mask, failed = json.loads(done.stdout)
    assert before == 1 and cpus == len(os.sched_getaffinity(0))
    assert (blocked, mask) == ([], 0o077)
    # Without the right to it, a priority cannot be raised again, and that is said.
    assert priority == 0 or any("priority" in sentence for sentence in failed)
    assert all("limit" in sentence or "priority" in sentence for sentence in failed)


def test_of_the_environment_only_what_leads_to_python_and_to_us() -> None:
    own = {
        **{"PATH": "/bin", "PYTHONPATH": "/x", "LC_ALL": "C", "PAGECACHE_BPF_RUN_DIR": "/r"},
        **{"LD_PRELOAD": "libjemalloc.so", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": ""},
    }
    assert environment(own).keys() == {"PATH", "PYTHONPATH", "LC_ALL", "PAGECACHE_BPF_RUN_DIR"}
