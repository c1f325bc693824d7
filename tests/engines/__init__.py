# SPDX-License-Identifier: Apache-2.0
"""Engines that start from a cold disk, with us and without: `make test-engines` (large)."""
