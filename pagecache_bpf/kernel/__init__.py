# SPDX-License-Identifier: Apache-2.0
"""What this package asks the kernel: its interfaces, and nothing of policies, models or loads."""
