# SPDX-License-Identifier: Apache-2.0
"""`python -m pagecache_bpf` is the command pagecache-bpf."""

import sys

from pagecache_bpf.cli.main import main

sys.exit(main())
