# SPDX-License-Identifier: Apache-2.0
"""A guest with a stock kernel: boots under QEMU on this machine's own root file system."""

from benchmarks.guest.runner import Disk, Guest, GuestError, Result, end_on_sigterm, explain

__all__ = ["Disk", "Guest", "GuestError", "Result", "end_on_sigterm", "explain"]
