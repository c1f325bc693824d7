# SPDX-License-Identifier: Apache-2.0
"""What is counted, declared once, and how it is published."""
