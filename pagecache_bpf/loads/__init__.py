# SPDX-License-Identifier: Apache-2.0
"""Loads: what pagecache_bpf.load() does, in the best of three ways.

remote.py asks the controller, direct.py attaches a policy as root, alone.py does what a process
without any right can do by itself.
"""
