# SPDX-License-Identifier: Apache-2.0
"""Engine `agent`: policies on tracepoints, carried out by a process with ordinary system calls."""
