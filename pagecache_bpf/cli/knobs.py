# SPDX-License-Identifier: Apache-2.0
"""The option --knob NAME=VALUE of the commands that set knobs of a policy."""

from __future__ import annotations

import argparse


def add_knobs(parser: argparse.ArgumentParser) -> None:
    """Add --knob to a command; the policy decides what a knob's value means.

    Args:
        parser: the command's parser; `args.knob` becomes a list of pairs of name and value.
    """
    parser.add_argument(
        "--knob",
        metavar="NAME=VALUE",
        action="append",
        type=_setting,
        default=[],
        help="set a knob (`policy show POLICY` lists them); may be given several times",
    )


def _setting(text: str) -> tuple[str, str]:
    """Split NAME=VALUE, neither of them empty; argparse tells the error that this raises."""
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
