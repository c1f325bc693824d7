# SPDX-License-Identifier: Apache-2.0
"""Recordings of loads: what each part of a model's files went through while it was loaded.

recorder.py makes one with the observer's programs (root only); format.py keeps it in a file that
anybody can read.  What is shown of a recording is the business of pagecache_bpf.reporting.
"""
