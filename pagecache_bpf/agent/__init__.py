# SPDX-License-Identifier: Apache-2.0
"""Engine `agent`: policies on tracepoints, carried out by a process with ordinary system calls.

It knows policies, files and readers; what a load or a client is, only the controller knows.
"""
