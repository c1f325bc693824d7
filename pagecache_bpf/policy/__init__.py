# SPDX-License-Identifier: Apache-2.0
"""Policies: found, compiled, loaded and attached on either engine, and the maps they share."""
