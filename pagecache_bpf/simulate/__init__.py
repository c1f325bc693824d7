# SPDX-License-Identifier: Apache-2.0
"""Replays traces against policies without a kernel: the page cache's model, and the optimum.

Nothing here asks the kernel or the controller, and nothing needs root.
"""

from __future__ import annotations

#: struct sim_totals: members in their order, and what they are.
TOTALS = {
    "wanted_bytes": "read by the trace",
    "hit_bytes": "of these: in the cache since an earlier use",
    "ahead_bytes": "of these: in the cache because they were read ahead for this use",
    "missed_bytes": "of these: not in the cache",
    "read_bytes": "read from the device, ahead of use or not",
    "reread_bytes": "of these: not for the first time",
    "unused_bytes": "read ahead and gone without having been used",
    "evicted_bytes": "evicted",
    "dropped_bytes": "dropped at the policy's request",
    "peak_bytes": "most in the cache at a time",
    "asked": "answers of the evict hook",
    "kept": "of these: keep",
    "now": "of these: evict now",
    "keep_ignored": "evicted in spite of keep: everything else was kept, too",
    "invalid_answers": "answers that made no sense",
}
