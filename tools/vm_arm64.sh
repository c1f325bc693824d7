#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Boot Debian's kernel for arm64 in an emulated machine, and try the module that tools/cross_kmod.sh
# has compiled for it: tests/arm64/try_module.py.  vm_arm64.sh RELEASE [FLAVOR...], where the flavors
# are arm64 (pages of 4 KiB) and arm64-16k; both by default.
#
# The machine has no other system than an initramfs: busybox, the Python and libbpf of build/arm64
# (tools/deps.sh arm64), this tree's package and its policies, and the kernel modules that a disk needs.
# Nothing of this machine is changed; what is fetched lies in build/arm64-guest.
set -euo pipefail
cd "$(dirname "$0")/.."

. tools/logged.sh

OWN=${1:?"vm_arm64.sh RELEASE [FLAVOR...], of a kernel that tools/cross_kmod.sh has compiled for"}
shift
RELEASE=${OWN%-amd64}
FLAVORS=("$@")
[ ${#FLAVORS[@]} -gt 0 ] || FLAVORS=(arm64 arm64-16k)
DIR=$PWD/build/arm64-guest/$RELEASE
SECONDS_AT_MOST=${SECONDS_AT_MOST:-1200}

fetch() {
	[ -e "$DIR/complete" ] && return
	say "fetching the kernels of $RELEASE for arm64"
	. tools/private_apt.sh
	rm -rf "$DIR"
	mkdir -p "$DIR/packages"
	apt_private "$DIR" "$(. /etc/os-release && echo "$VERSION_CODENAME")" arm64
	(
		export APT_CONFIG=$DIR/apt/conf
		cd "$DIR/packages"
		logged ../apt.log apt-get update -q
		logged ../apt.log apt-get download "linux-image-$RELEASE-arm64-unsigned" \
			"linux-image-$RELEASE-arm64-16k-unsigned" busybox-static
	)
	for package in "$DIR"/packages/*.deb; do
		dpkg -x "$package" "$DIR/image"
		rm "$package"
	done
	touch "$DIR/complete"
}

# Two files of known contents on a disk: one that is loaded, and a stream that is larger.
disk() {
	[ -e "$DIR/disk.img" ] && return
	rm -rf "$DIR/files"
	mkdir "$DIR/files"
	head -c $((16 << 20)) /dev/urandom >"$DIR/files/weights.bin"
	head -c $((48 << 20)) /dev/urandom >"$DIR/files/stream.bin"
	sha256sum "$DIR/files/weights.bin" | cut -d' ' -f1 >"$DIR/sha256"
	truncate -s 96M "$DIR/disk.new"
	/sbin/mkfs.ext4 -q -d "$DIR/files" "$DIR/disk.new"
	mv "$DIR/disk.new" "$DIR/disk.img"
}

# initramfs KERNEL: the machine's only system, in $DIR/KERNEL.cpio.gz
initramfs() {
	local kernel=$1 root=$DIR/root module line
	rm -rf "$root"
	mkdir -p "$root"/{bin,dev,proc,sys,mnt,run,tmp,modules,app/build/bpf,app/bpf}
	cp -a build/arm64/{lib,usr} "$root/"
	cp "$DIR/image/bin/busybox" "$root/bin/"
	for name in sh cat mount insmod rmmod poweroff; do
		ln -s busybox "$root/bin/$name"
	done
	cp -a pagecache_bpf tests "$root/app/"
	cp -a bpf/policies "$root/app/bpf/"
	cp -a build/bpf/*.o build/bpf/test "$root/app/build/bpf/"
	cp -a build/venv/lib/python3*/site-packages/elftools "$root/app/"
	cp "build/kmod/$kernel/pagecache_bpf.ko" "$root/"
	/sbin/depmod -b "$DIR/image" "$kernel"
	for module in virtio_pci virtio_blk ext4; do
		/sbin/modprobe -d "$DIR/image" -S "$kernel" --show-depends "$module"
	done | sed -n 's/^insmod //p' | awk '!seen[$1]++ { print $1 }' | while read -r line; do
		cp "$line" "$root/modules/"
		basename "$line" .xz >>"$root/modules/order"
	done
	find "$root/modules" -name '*.xz' -exec xz -d {} +
	cat >"$root/init" <<-INIT
		#!/bin/sh
		mount -t proc proc /proc
		mount -t sysfs sysfs /sys
		mount -t devtmpfs devtmpfs /dev
		mount -t tracefs tracefs /sys/kernel/tracing
		mount -t cgroup2 cgroup2 /sys/fs/cgroup
		echo +memory >/sys/fs/cgroup/cgroup.subtree_control
		while read -r module; do insmod "/modules/\$module"; done </modules/order
		mount -t ext4 -o ro /dev/vda /mnt
		echo "== the command begins"
		cd /app
		PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PAGECACHE_BPF_OBSERVE=off \\
			/usr/bin/python3.11 tests/arm64/try_module.py /pagecache_bpf.ko /mnt $(cat "$DIR/sha256")
		echo "== the command ended with \$?"
		poweroff -f
	INIT
	chmod +x "$root/init"
	(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$DIR/$kernel.cpio.gz"
}

# boot KERNEL: fails if the command does, or if the kernel complains.
boot() {
	local kernel=$1 log=$DIR/$1.log
	say "booting $kernel (log: $log)"
	timeout -k 10 "$SECONDS_AT_MOST" qemu-system-aarch64 -M virt -cpu neoverse-n1 -smp 2 -m 1G \
		-nographic -nodefaults -serial stdio -no-reboot -net none \
		-kernel "$DIR/image/boot/vmlinuz-$kernel" -initrd "$DIR/$kernel.cpio.gz" \
		-append "console=ttyAMA0 panic=-1 printk.time=1" \
		-drive "file=$DIR/disk.img,if=virtio,format=raw,readonly=on" </dev/null >"$log" 2>&1 || {
		tail -n 40 "$log" >&2
		say "the machine did not end by itself"
		return 1
	}
	tr -d '\r' <"$log" | sed -n '/^== the command begins/,/^== the command ended/p'
	build/venv/bin/python - "$log" <<-'PY'
		import pathlib, sys
		from benchmarks.guest.console import find_problems
		log = pathlib.Path(sys.argv[1]).read_text(errors="replace")
		problems = find_problems(log.splitlines())
		print(*problems, sep="\n")
		sys.exit(bool(problems) or "== the command ended with 0" not in log)
	PY
}

command -v qemu-system-aarch64 >/dev/null || {
	say "qemu-system-aarch64 is missing: apt-get install qemu-system-arm"
	exit 4
}
fetch
disk
status=0
for flavor in "${FLAVORS[@]}"; do
	initramfs "$RELEASE-$flavor"
	boot "$RELEASE-$flavor" || status=1
done
exit $status
