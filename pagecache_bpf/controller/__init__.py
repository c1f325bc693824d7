# SPDX-License-Identifier: Apache-2.0
"""The controller: one root process that holds policies, loads, budgets and a public socket."""
