# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, and what loading a model on it would do, without loading it."""
