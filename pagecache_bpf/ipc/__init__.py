# SPDX-License-Identifier: Apache-2.0
"""The sockets of the controller: messages, the client, and what both servers stand on."""
