# SPDX-License-Identifier: Apache-2.0
"""Boils the kernel's log about a refused program down to what its author has to know."""

from __future__ import annotations

import re

# "12: (61) r0 = *(u32 *)(r1 +0)   ; R0=... R1=..."
_INSTRUCTION = re.compile(r"\d+: \([0-9a-f]{2}\) (?P<text>.*?)(?:\s+; .*)?$")
# "; return *wrong; @ policy.bpf.c:12", before 6.10 without the place
_SOURCE = re.compile(r"; (?P<text>.*?)(?: @ (?P<place>\S+:\d+))?$")
# States of registers, the search for precise values, statistics, sub-programs: no verdict.
_NOISE = re.compile(
    r"(\d+: )?(frame\d+: )?R\d+(_\w+)?=|(\d+: )?fp-\d+|from \d+ to \d+|last_idx |first_idx |"
    r"(parent|regs=|mark_precise|propagating|processed \d|verification time|stack depth|"
    r"safe$|func#|Func#|Validating |caller|callee|returning from callee|to caller at|"
    r"BPF program load|reg type unsupported for arg|arg#\d+ reference type|-- (BEGIN|END))"
)
VERDICT_LINES = 4
# Since 7.3 a report for people follows, which quotes instructions and source lines again.
_REPORT = "\nVerification failed: "
_SUGGESTION = "\nSuggestion:\n"


def boil_down(log: str) -> str:
    """Extract from the verifier's log what the author of a program has to know.

    Args:
        log: the whole log.

    Returns:
        The verdict, the source line and the instruction it is about, and what the kernel suggests
        (since 7.3); "" if there is no log.
    """
    verdict: list[str] = []
    source = instruction = ""
    trace, _, report = log.partition(_REPORT)
    for line in map(str.strip, trace.splitlines()):
        if found := _INSTRUCTION.match(line):
            instruction, verdict = found["text"], []
        elif found := _SOURCE.match(line):
            source = f"{found['place']}: {found['text']}" if found["place"] else found["text"]
            instruction, verdict = "", []
        elif line and not _NOISE.match(line):
            verdict.append(line)
    parts = ["; ".join(verdict[-VERDICT_LINES:])]
    if source:
        parts.append(f"at {source}")
    if instruction:
        parts.append(f"(instruction: {instruction})")
    if _SUGGESTION in report:
        suggestion = report.partition(_SUGGESTION)[2].partition("\n\n")[0]
        parts.append(f"The kernel suggests: {' '.join(suggestion.split())}")
    return "\n  ".join(part for part in parts if part)
