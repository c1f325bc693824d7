#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Unpack a distribution's kernel to boot guests with: unpack_kernel.sh PACKAGE.deb...
# The packages are that of the image and those of its modules, such as Ubuntu's linux-image-RELEASE and
# linux-modules-RELEASE.  Nothing of this machine is changed; all lies in build/kernels/RELEASE.  The last
# line printed is the image: make test-old OLD_KERNEL=IMAGE.
set -euo pipefail
. "$(dirname "$0")/logged.sh"

[ $# -gt 0 ] || {
	say "name the packages of a kernel: unpack_kernel.sh PACKAGE.deb..."
	exit 2
}
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
for package; do
	dpkg-deb -x "$package" "$unpacked"
done
image=$(find "$unpacked/boot" -maxdepth 1 -name 'vmlinuz-*' -print -quit 2>/dev/null || true)
[ -n "$image" ] || {
	say "none of these packages has a kernel's image (boot/vmlinuz-RELEASE): add the package of the image"
	exit 1
}
release=${image##*/vmlinuz-}
modules=$(find "$unpacked" -type d -path "*/lib/modules/$release" -print -quit)
[ -n "$modules" ] || {
	say "none of these packages has modules for $release: add the package of its modules"
	exit 1
}
place=$(dirname "$0")/../build/kernels/$release/image/usr/lib/modules
mkdir -p "$place"
rm -rf "${place:?}/$release"
cp -a "$modules" "$place/$release"
cp "$image" "$place/$release/vmlinuz"
depmod -b "$place/../.." "$release"
realpath "$place/$release/vmlinuz"
