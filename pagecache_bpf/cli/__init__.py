# SPDX-License-Identifier: Apache-2.0
"""The command line.

main.py runs a command and turns errors into messages and exit codes, parser.py builds the
parser, output.py prints, and each module in verbs/ is one command: adding a command is adding
one file there.
"""
