# SPDX-License-Identifier: Apache-2.0
"""I/O templates: the order in which a loader will want the bytes of a model, and for whom.

A template is derived from the headers of weight files (derive), recorded from a real load
(record) or imported from a MAIO text trace (traces); it is written as text (text), compared with
the files it is meant for (fit) and laid out for policies (layout).  numpy underneath;
nothing here needs root or the kernel.
"""

from pagecache_bpf.templates.derive import derive
from pagecache_bpf.templates.fit import Fit, check, locate, require_fit
from pagecache_bpf.templates.template import EXTENT, Template
from pagecache_bpf.templates.text import is_template, read, write
from pagecache_bpf.weights.identity import TemplateFile

__all__ = [
    "EXTENT",
    "Fit",
    "Template",
    "TemplateFile",
    "check",
    "derive",
    "is_template",
    "locate",
    "read",
    "require_fit",
    "write",
]
