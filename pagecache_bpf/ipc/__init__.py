# SPDX-License-Identifier: Apache-2.0
"""The controller's two sockets: framing, errors on the wire, clients, and the server's loop.

Both sockets speak the same way (wire): one line of JSON for a request, one for its answer, open
files beside it.  public_protocol says what anybody may ask; operations collects what root may.
Nothing here knows what a load or a policy is.
"""
