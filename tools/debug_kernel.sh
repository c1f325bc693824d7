#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build a kernel that finds mistakes (lockdep, KASAN, debug objects) from Debian's kernel source
# package, and the module for it, into build/debug-kernel.  The last line printed is the kernel
# tree, for `python -m benchmarks.guest --kernel`.  Takes about a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(linux-source-6.12 bison flex libelf-dev libssl-dev bc dwarves xz-utils)
VNG=$PWD/build/venv/bin/vng
CONFIG=$PWD/tools/debug_kernel.config
TREE=$PWD/build/debug-kernel/linux-source-6.12
JOBS=${JOBS:-$(nproc)}

. tools/logged.sh

packages() {
	local missing=()
	for package in "${PACKAGES[@]}"; do
		dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null |
			grep -qx installed || missing+=("$package")
	done
	if [ ${#missing[@]} -eq 0 ]; then
		return
	fi
	if [ "$(id -u)" -ne 0 ]; then
		say "not installed: ${missing[*]}; run this as root, or install them yourself"
		exit 4
	fi
	say "installing ${missing[*]}"
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		"${missing[@]}" >build/apt.log 2>&1 || {
		tail -n 20 build/apt.log >&2
		exit 1
	}
}

packages
mkdir -p build/debug-kernel
if [ ! -e "$TREE/Makefile" ]; then
	say "unpacking the kernel source"
	tar -xf /usr/src/linux-source-6.12.tar.xz -C build/debug-kernel
fi
if [ ! "$TREE/.config" -nt "$CONFIG" ]; then
	say "configuring"
	# virtme-ng calls its own helpers by name.
	(cd "$TREE" && PATH=${VNG%/*}:$PATH logged ../config.log "$VNG" --kconfig --force --config "$CONFIG")
	touch "$TREE/.config"
fi
for option in PROVE_LOCKING KASAN DEBUG_INFO_BTF FUNCTION_TRACER DM_DELAY XFS_FS EXT4_FS USER_NS NFSD_V4; do
	grep -qx "CONFIG_$option=y" "$TREE/.config" || {
		say "CONFIG_$option did not survive the configuration: see $TREE/.config"
		exit 1
	}
done
say "building the kernel with $JOBS jobs (log: build/debug-kernel/build.log)"
logged build/debug-kernel/build.log make -C "$TREE" -j"$JOBS" bzImage modules
release=$(make -s -C "$TREE" kernelrelease)
tools/build_kmod.sh "$release" "$TREE" >&2
echo "$TREE"
