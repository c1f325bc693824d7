# SPDX-License-Identifier: Apache-2.0
"""A Kubernetes cluster of this machine's own: `make test-cluster`."""
