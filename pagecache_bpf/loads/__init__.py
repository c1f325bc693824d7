# SPDX-License-Identifier: Apache-2.0
"""Loads: what pagecache_bpf.load() does, in the best of three ways.

through_controller asks the controller, attached attaches a policy as root, and unprivileged has
threads of this process read ahead.  begin chooses among them; open_load is the load that callers
share.
"""
