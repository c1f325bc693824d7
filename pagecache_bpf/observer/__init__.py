# SPDX-License-Identifier: Apache-2.0
"""The observer: what the readers of tagged files found in the page cache.

Programs on tracepoints and functions count in the kernel, by model and by process that reads; this
package loads them and reads the counts.  Root only.

    with Observer() as observer:
        observer.tag(fd, "llama-3-8b")
        observer.snapshot()

A snapshot is a dict that JSON can carry.  Sizes are bytes, times nanoseconds:

    {
      "time_ns": int,             CLOCK_REALTIME
      "level": "full" | "degraded" | "off",
      "missing": [str],           events that nothing on this kernel tells of
      "uncounted": [str],         counters that stay 0 for want of these
      "backend": "libbpf" | "bcc",
      "lost_events": int,         everything that was not counted or told for lack of room
      "models": [
        {
          "model": str,
          "policy": str | None,   as the caller of tag() said
          "engine": str | None,
          "files": int,
          "gone": int,            of these: deleted or replaced; they count no bytes
          "bytes": int,           size of the files
          "resident_bytes": int,  in the cache now, by cachestat(2)
          "resident_by_node": {"0": int, ...} | "unknown",
          "since_ns": int,        when its first file was tagged, after it had none
          "counters": {name: int},    every member of kernel.abi.OBSERVED; these only grow
          "counters_before": {name: int},    what they were at since_ns
          "consumers": [
            {"tgid": int, "comm": str, "alive": bool,
             "counters": {name: int}, "counters_before": {name: int}}
          ]
        }
      ]
    }

"degraded": where nothing tells of reads and faults (docs/agent.md says where) only what enters
and leaves the cache is counted; the counters of reads, mmap and stalls stay 0.  docs/observing.md
says what each counter means and what cannot be seen.
"""

from pagecache_bpf.observer.consumers import ENDED_KEPT
from pagecache_bpf.observer.observer import Move, Observer
from pagecache_bpf.observer.programs import RecordingGrid

__all__ = ["ENDED_KEPT", "Move", "Observer", "RecordingGrid"]
