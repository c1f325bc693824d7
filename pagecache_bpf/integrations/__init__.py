# SPDX-License-Identifier: Apache-2.0
"""Plug-ins for inference servers, one module a server, which find them by entry points."""
