#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fetch another kernel of Debian and build the module for it: other_kernel.sh RELEASE, such as
# 7.3.4+deb13-amd64 or 6.12.117+deb12-rt-amd64.  Nothing of this machine is changed: packages come through an apt directory of
# our own and are unpacked, not installed; compiler and headers live in a directory made with
# debootstrap, since the machine's own are too old for these headers.  All of it lies in
# build/kernels/RELEASE.  The last line printed is the image, for `python -m benchmarks.guest --kernel`.
# It exits with 4 where the kernel, or what is needed to build for it, cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."

RELEASE=$1
case $RELEASE in
*+deb12-*) SUITE=${SUITE:-bookworm} ;;
*) SUITE=${SUITE:-trixie} ;;
esac
DIR=$PWD/build/kernels/$RELEASE
IMAGE=$DIR/image/usr/lib/modules/$RELEASE/vmlinuz
ROOT=$DIR/root

. tools/logged.sh

if [ "$(id -u)" -ne 0 ]; then
	say "run this as root: debootstrap and chroot need it"
	exit 4
fi
command -v debootstrap >/dev/null || {
	say "debootstrap is not installed: apt-get install debootstrap"
	exit 4
}
. tools/private_apt.sh

fetched=
trap '[ -n "$fetched" ] || exit 4' EXIT
mkdir -p "$DIR"
if [ ! -e "$IMAGE" ]; then
	say "fetching the kernel $RELEASE"
	apt_private "$DIR" "$SUITE" "$(dpkg --print-architecture)"
	mkdir -p "$DIR/packages"
	(
		export APT_CONFIG=$DIR/apt/conf
		cd "$DIR/packages"
		logged ../apt.log apt-get update -q
		# Debian 12 has all in one package, and Debian 13 since 6.13 in three.
		if [ -n "$(apt-cache pkgnames "linux-binary-$RELEASE")" ]; then
			names=("linux-binary-$RELEASE" "linux-modules-$RELEASE" "linux-base-$RELEASE")
		else
			names=("linux-image-$RELEASE-unsigned")
		fi
		logged ../apt.log apt-get download "${names[@]}"
	)
	for package in "$DIR"/packages/*.deb; do
		dpkg -x "$package" "$DIR/image"
	done
	if [ -e "$DIR/image/boot/vmlinuz-$RELEASE" ]; then
		mkdir -p "$DIR/image/usr/lib/modules"
		mv "$DIR/image/lib/modules/$RELEASE" "$DIR/image/usr/lib/modules/$RELEASE"
		mv "$DIR/image/boot/vmlinuz-$RELEASE" "$IMAGE"
	fi
fi
if [ ! -e "$ROOT/usr/src/linux-headers-$RELEASE" ]; then
	say "making a place to build in"
	logged "$DIR/debootstrap.log" debootstrap --variant=minbase "$SUITE" "$ROOT" "$MIRROR"
	rm -f "$ROOT/etc/apt/sources.list"
	sources "$SUITE" >"$ROOT/etc/apt/sources.list.d/debian.list"
	logged "$DIR/apt.log" chroot "$ROOT" apt-get update -q
	logged "$DIR/apt.log" chroot "$ROOT" apt-get install -y -q --no-install-recommends \
		make gcc "linux-headers-$RELEASE"
fi
fetched=yes
mkdir -p "$ROOT/src/tests"
rm -rf "$ROOT"/src/{kmod,bpf,tools} "$ROOT/src/tests/kmod"
cp -a kmod bpf tools "$ROOT/src/"
cp -a tests/kmod "$ROOT/src/tests/"
mountpoint -q "$ROOT/proc" || mount -t proc proc "$ROOT/proc" # objtool asks it
trap 'umount "$ROOT/proc"' EXIT
chroot "$ROOT" /src/tools/build_kmod.sh "$RELEASE" >&2
mkdir -p build/kmod
rm -rf "build/kmod/$RELEASE"
cp -a "$ROOT/src/build/kmod/$RELEASE" build/kmod/
echo "$IMAGE"
