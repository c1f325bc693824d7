# SPDX-License-Identifier: Apache-2.0
"""One module a command; the command is called as its module.

A module has
    GROUP                       what it is for: a member of cli.parser.Group
    HELP                        one line, in the list of commands
    DESCRIPTION                 what it does, for --help and the manual page
    EXAMPLES                    (command line, what it does) pairs
    JSON                        {command: {key path: meaning}}, what --json prints
    add_arguments(parser)       its arguments
    run(args, out) -> int       does it, returns the exit code
"""
