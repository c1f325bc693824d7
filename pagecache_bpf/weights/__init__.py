# SPDX-License-Identifier: Apache-2.0
"""Which files a model is, and where its tensors lie in them."""
