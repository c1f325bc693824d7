# SPDX-License-Identifier: Apache-2.0
"""One module a command; the command is called as its module.

A module has
    GROUP                       what it is for: a member of cli.parser.Group
    HELP                        one line, in the list of commands
    DESCRIPTION                 what it does, for --help and the manual page
    EXAMPLES                    (command line, what it does) pairs
    JSON                        {command: {key path: meaning}}, what --json prints
    add_arguments(parser)       adds its arguments to `parser`, an argparse.ArgumentParser of its
                                own that has --json and the other common options already
    run(args, out) -> int       does it: `args` is the argparse.Namespace of its arguments, `out`
                                the cli.output.Output that all it says goes through, for people
                                or as JSON.  Returns the exit code, 0 if it is done; raises the
                                classes of pagecache_bpf.errors, which cli.main prints and turns
                                into exit codes

The two functions are described here, once, and not in each module.
"""
