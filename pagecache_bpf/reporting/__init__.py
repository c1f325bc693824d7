# SPDX-License-Identifier: Apache-2.0
"""What a recording of a load shows: one page for a browser, and a trace for Perfetto.

grid.py reduces a recording to what fits a screen, page.py puts it into a page that needs nothing
else, perfetto.py writes a trace.  Nothing here needs root, and nothing asks the kernel.
"""
