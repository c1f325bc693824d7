# SPDX-License-Identifier: Apache-2.0
"""`python -m pagecache_bpf.controller`: the process that `attach --engine agent` starts."""

import sys

from pagecache_bpf.controller.daemon import on_demand

if __name__ == "__main__":
    sys.exit(on_demand())
