# SPDX-License-Identifier: Apache-2.0
"""Replays traces against policies without a kernel: the model, the optimum and the traces."""
