#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compile the module for arm64, with pages of 4 and of 16 KiB, by Debian's cross compiler: headers of
# the guest's kernel for that architecture are unpacked into build/arm64-kernel, and use the programs
# of this machine's own headers.  Nothing of it is run.
set -euo pipefail
cd "$(dirname "$0")/.."

. tools/logged.sh

OWN=${1:?"cross_kmod.sh RELEASE, of a kernel whose headers are installed here"}
RELEASE=${OWN%-amd64}
DIR=$PWD/build/arm64-kernel/$RELEASE
KBUILD=usr/lib/linux-kbuild-$RELEASE

[ -e "/$KBUILD" ] || {
	say "/$KBUILD is missing: install linux-headers-$OWN"
	exit 4
}
if [ ! -e "$DIR/complete" ]; then
	say "fetching the headers of $RELEASE for arm64"
	. tools/private_apt.sh
	rm -rf "$DIR"
	mkdir -p "$DIR/packages" "$DIR/tree/usr/lib"
	apt_private "$DIR" "$(. /etc/os-release && echo "$VERSION_CODENAME")" arm64
	(
		export APT_CONFIG=$DIR/apt/conf
		cd "$DIR/packages"
		logged ../apt.log apt-get update -q
		logged ../apt.log apt-get download "linux-headers-$RELEASE-common" \
			"linux-headers-$RELEASE-arm64" "linux-headers-$RELEASE-arm64-16k"
	)
	for package in "$DIR"/packages/*.deb; do
		dpkg -x "$package" "$DIR/tree"
	done
	# Where they are installed stands in them.
	sed -i "s|/usr/src|$DIR/tree/usr/src|" "$DIR"/tree/usr/src/*/Makefile
	ln -s "/$KBUILD" "$DIR/tree/$KBUILD"
	touch "$DIR/complete"
fi
for flavor in arm64 arm64-16k; do
	tools/build_kmod.sh "$RELEASE-$flavor" "$DIR/tree/usr/src/linux-headers-$RELEASE-$flavor"
done
