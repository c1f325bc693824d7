#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the module for one kernel: build_kmod.sh KERNELRELEASE [KERNELDIR].  Sources are copied to
# build/kmod/KERNELRELEASE, so the tree stays clean and several kernels can be built for.
set -euo pipefail
cd "$(dirname "$0")/.."

release=$1
kernel=${2:-/lib/modules/$release/build}
out=$PWD/build/kmod/$release
module=$out/pagecache_bpf.ko
started=$out/started # when sources were copied: what changes while they are compiled is not in the module

if [ ! -e "$kernel/Makefile" ]; then
	echo "no headers for kernel $release in $kernel: install linux-headers-$release" >&2
	exit 3
fi
newest=$(find kmod bpf/include tests/kmod -type f -newer "$started" -print -quit 2>/dev/null || echo stale)
if [ -e "$module" ] && [ -z "$newest" ] && [ ! "$kernel/Makefile" -nt "$started" ]; then
	exit 0
fi
mkdir -p "$out/include"
rm -f "$out"/*.[ch] "$module"
touch "$started"
cp kmod/*.[ch] kmod/Kbuild "$out"
cp bpf/include/pagecache_*.h "$out/include"
echo "  KMOD    $release"
log=$out/build.log
# A warning of the compiler is a failure; pahole's are not ours.
if ! make -C "$kernel" M="$out" KCFLAGS=-Werror modules >"$log" 2>&1; then
	tail -n 40 "$log" >&2
	exit 1
fi
# A module of the tests, which takes what ours needs.
mkdir -p "$out/test"
cp tests/kmod/* "$out/test"
if ! make -C "$kernel" M="$out/test" KCFLAGS=-Werror modules >"$log.test" 2>&1; then
	tail -n 40 "$log.test" >&2
	exit 1
fi
# Not grep -q: it ends before readelf has written all, which pipefail takes for a failure.
if ! readelf -S --wide "$module" | grep ' \.BTF ' >/dev/null; then
	tail -n 20 "$log" >&2
	echo "the module was built without BTF: pahole (package dwarves) or $kernel/vmlinux is missing" >&2
	exit 1
fi
