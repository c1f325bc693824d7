# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts of this folder; runs nothing by itself.

# say TEXT: tell people, on stderr.
say() { printf '== %s\n' "$*" >&2; }

# logged LOG COMMAND...: run a command, and show the end of its log if it fails.
logged() {
	local log=$1
	shift
	"$@" >"$log" 2>&1 || {
		tail -n 40 "$log" >&2
		say "failed: $* (log: $log)"
		exit 1
	}
}
