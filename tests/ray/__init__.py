# SPDX-License-Identifier: Apache-2.0
"""A real Ray cluster on one machine: make test-ray."""
