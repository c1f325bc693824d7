# SPDX-License-Identifier: Apache-2.0
"""What libbpf says in words: collected for an error's text, instead of printed."""

from __future__ import annotations

import ctypes

from pagecache_bpf.kernel.libbpf_library import PRINT_FUNCTION, library

MESSAGE_BYTES = 64 << 10

_DEBUG = 2  # enum libbpf_print_level


class Messages:
    """Collects what libbpf says in a with block, instead of letting it go to stderr."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._text = ctypes.create_string_buffer(MESSAGE_BYTES)
        self._format = ctypes.CDLL(None).vsnprintf
        self._format.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_void_p,
        )
        self._callback = PRINT_FUNCTION(self._called_back)

    def __enter__(self) -> Messages:
        # The process may use libbpf for other things, so what was set before comes back.
        self._before = library().libbpf_set_print(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        library().libbpf_set_print(ctypes.cast(self._before, PRINT_FUNCTION))

    def _called_back(self, level: int, template: bytes, arguments: int) -> int:
        # A va_list is handed on as a pointer: so it is passed on amd64 and on arm64.
        """Format a message as vsnprintf(3) does and keep it, unless it is for debugging."""
        if level < _DEBUG:
            self._format(self._text, MESSAGE_BYTES, template, arguments)
            text = self._text.value.decode("utf-8", "replace")
            self.lines += [line.removeprefix("libbpf: ") for line in text.splitlines()]
        return 0
