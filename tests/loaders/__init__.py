# SPDX-License-Identifier: Apache-2.0
"""Templates against what real loaders read: `make test-loaders`, in an environment of its own."""
