# SPDX-License-Identifier: Apache-2.0
"""Which files a model is, in the order of its loader, and where its tensors lie in them.

It opens files for reading only, and knows nothing of policies, tags or loads.
"""
