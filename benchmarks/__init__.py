# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of pagecache-bpf: `python -m benchmarks.NAME` writes build/bench/NAME.json."""
