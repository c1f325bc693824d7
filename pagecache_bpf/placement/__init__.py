# SPDX-License-Identifier: Apache-2.0
"""Which node starts a model soonest: the score of a node, and those who use it."""
