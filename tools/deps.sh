#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what is missing for one or more roles: deps.sh [wheel] [demo] [dist] [containers] [arm64] [cross] [vm-arm64] [kernels] [test]; wheel and test by default.
#
#   wheel  what `pip wheel .` and `make install` need: clang, make, Python's venv, libbpf >= 1.4
#   demo   with wheel: a virtual environment in build/venv-demo
#   dist   what the packages and the image need besides: debootstrap, buildah, lintian
#   containers  podman, runc and cpio, and in build/deps containerd
#   arm64  in build/arm64, Debian 12's libbpf for arm64 and a Python to try the wheel with (Debian only)
#   cross  the compiler for arm64, for `make kmod-arm64`
#   vm-arm64  the emulator of an arm64 machine, for `make vm-arm64`
#   kernels  debootstrap, for `make test-kernels`: compilers of another release of Debian
#   test   what building the module, testing and the guest need, with a virtual environment in
#          build/venv and, in build/deps, the servers of Prometheus and NFS
#
# PYTHON=/usr/bin/python3 names the Python that environments are made with.
#
# What is there is asked of the machine, not of a list of packages; only what to install is named,
# for apt (Debian 12 and 13, Ubuntu) and for dnf (Fedora, RHEL and its like: role wheel).  Root is
# needed only where a package is missing.  libbpf is fetched into build/deps where the system's is
# older.  The system's own package sources are used and left as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

ROLES=" ${*:-wheel test} "
LIBBPF_MIN=1.4
DEPS=$PWD/build/deps
VENV=$PWD/build/venv

say() { printf '== %s\n' "$*" >&2; }

role() { [[ $ROLES == *" $1 "* ]]; }

has() { command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }

has_clang() {
	local name
	for name in clang clang-{14..30}; do
		has "$name" && return
	done
	return 1
}

has_file() { compgen -G "$1" >/dev/null; }

has_library() { python3 -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null; }

# bcc is Debian's own Python's.
has_bcc() { /usr/bin/python3 -c 'import bcc' 2>/dev/null; }

has_venv() { "${PYTHON:-python3}" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# What is missing, by the names that apt and dnf have for it.
WANTED_APT=()
WANTED_DNF=()

# need APT DNF CHECK...: a name for apt may be several, the first that there is is taken: a|b.
need() {
	local apt=$1 dnf=$2
	shift 2
	"$@" || {
		WANTED_APT+=("$apt")
		WANTED_DNF+=("$dnf")
	}
}

needs() {
	need python3-venv python3 has_venv
	need make make has make
	need clang clang has_clang
	need 'libelf1t64|libelf1' elfutils-libelf has_library libelf.so.1
	if role dist || role kernels; then
		need debootstrap debootstrap has debootstrap
	fi
	if role dist; then
		need buildah buildah has buildah
		need lintian '' has lintian
	fi
	if role arm64; then
		need qemu-user-static '' has qemu-aarch64-static
	fi
	if role cross; then
		need gcc-aarch64-linux-gnu gcc-aarch64-linux-gnu has aarch64-linux-gnu-gcc
	fi
	if role vm-arm64; then
		need cpio cpio has cpio
		need qemu-system-arm qemu-system-aarch64 has qemu-system-aarch64
	fi
	if role containers; then
		need cpio cpio has cpio
		need podman podman has podman
		need runc runc has runc
		need uidmap shadow-utils has newuidmap
	fi
	if role test; then
		need bc bc has bc
		need busybox-static busybox has busybox
		need btrfs-progs btrfs-progs has mkfs.btrfs
		need chromium chromium has chromium
		need chromium-driver chromedriver has chromedriver
		need dmsetup device-mapper has dmsetup
		need dwarves dwarves has pahole
		need e2fsprogs e2fsprogs has mkfs.ext4
		need erofs-utils erofs-utils has mkfs.erofs
		need gcc gcc has gcc
		need kmod kmod has modprobe
		need 'libtirpc3t64|libtirpc3' libtirpc has_library libtirpc.so.3
		need libwrap0 '' has_library libwrap.so.0
		need libc6-dev glibc-devel has_file '/usr/include/stdio.h'
		need 'linux-headers-6.12-amd64|linux-headers-amd64' '' has_file '/lib/modules/6.12*/build/Makefile'
		need 'linux-image-6.12-amd64|linux-image-amd64' '' has_file '/boot/vmlinuz-6.12*'
		need openssl openssl has openssl
		need python3-bpfcc python3-bcc has_bcc
		need qemu-system-x86 qemu-kvm has qemu-system-x86_64
		need qemu-utils qemu-img has qemu-img
		need squashfs-tools squashfs-tools has mksquashfs
		need squashfuse squashfuse has squashfuse
		need vmtouch vmtouch has vmtouch
		need xfsprogs xfsprogs has mkfs.xfs
	fi
}

with_apt() {
	local names=() name candidate
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	for name in "$@"; do
		for candidate in ${name//|/ }; do
			[ -n "$(apt-cache policy "$candidate" | grep 'Candidate: [^(]')" ] && break
		done
		names+=("$candidate")
	done
	say "installing ${names[*]}"
	apt-get install -y -qq --no-install-recommends "${names[@]}" >build/apt.log 2>&1 || {
		tail -n 20 build/apt.log >&2
		exit 1
	}
}

packages() {
	needs
	if [ ${#WANTED_APT[@]} -eq 0 ]; then
		return
	fi
	if [ "$(id -u)" -ne 0 ]; then
		say "not installed: ${WANTED_APT[*]}"
		say "run tools/deps.sh$ROLES as root, or install them yourself"
		exit 4
	fi
	if has apt-get; then
		with_apt "${WANTED_APT[@]}"
	elif has dnf && ! role test; then
		dnf install -y -q ${WANTED_DNF[*]} >&2
	else
		say "not installed, by Debian's names: ${WANTED_APT[*]}"
		say "this machine has neither apt nor, for role wheel, dnf: install them yourself"
		exit 3
	fi
}

# The version of a libbpf.so, asked of the library itself.
libbpf_version() {
	python3 - "$1" <<'PY'
import ctypes, sys
try:
    library = ctypes.CDLL(sys.argv[1])
    print(f"{library.libbpf_major_version()}.{library.libbpf_minor_version()}")
except (OSError, AttributeError):
    print("0")
PY
}

new_enough() { [ "$(printf '%s\n' "$LIBBPF_MIN" "$1" | sort -V | head -n 1)" = "$LIBBPF_MIN" ]; }

find_libbpf() { find "$DEPS" -name 'libbpf.so.1' 2>/dev/null | head -n 1; }

# Fetch packages of another suite without adding it to the system: apt is given a private list of
# sources, the machine's own with the suite's name replaced.
from_suite() {
	local suite=$1 apt=$PWD/build/apt
	shift
	rm -rf "$apt"
	mkdir -p "$apt/lists/partial" "$apt/debs"
	python3 - "$suite" >"$apt/private.sources" <<'PY'
import pathlib, re, sys
suite = sys.argv[1]
for path in sorted(pathlib.Path("/etc/apt").glob("sources.list.d/*.sources")):
    for block in re.split(r"\n\s*\n", path.read_text()):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        text = "\n".join(lines)
        if re.search(r"^URIs:.*/debian/?\s*$", text, re.M) and "debian-security" not in text:
            print(re.sub(r"^Suites:.*$", f"Suites: {suite}", text, flags=re.M) + "\n")
            sys.exit()
for path in [pathlib.Path("/etc/apt/sources.list"), *pathlib.Path("/etc/apt").glob("sources.list.d/*.list")]:
    for line in path.read_text().splitlines() if path.exists() else []:
        match = re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+/debian/?)\s", line)
        if match:
            print(f"Types: deb\nURIs: {match[1]}\nSuites: {suite}\nComponents: main\n"
                  "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg")
            sys.exit()
sys.exit("no Debian source found in /etc/apt")
PY
	local options=(
		-o "Dir::Etc::sourcelist=$apt/private.sources" -o Dir::Etc::sourceparts=/nonexistent
		-o "Dir::State::lists=$apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
		-o APT::Sandbox::User=root ${ARCHITECTURE:+-o APT::Architecture=$ARCHITECTURE -o APT::Architectures=$ARCHITECTURE}
	)
	apt-get -qq "${options[@]}" update >&2
	(cd "$apt/debs" && apt-get -qq "${options[@]}" download "$@" >&2)
	for deb in "$apt"/debs/*.deb; do
		dpkg -x "$deb" "$DEPS"
	done
}

# The kernel's source carries libbpf in tools/lib/bpf, as new as the kernel: Debian's linux-source-6.12, Ubuntu's newest.
from_kernel_source() {
	local package=linux-source-6.12 archive
	if [ "$(id -u)" -eq 0 ]; then
		apt-cache show $package >/dev/null 2>&1 ||
			package=$(apt-cache search --names-only '^linux-source-[0-9.]+$' | cut -d' ' -f1 | sort -V | tail -n 1)
		say "building libbpf from $package"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${package:-linux-source}" \
			gcc libc6-dev libelf-dev zlib1g-dev pkg-config xz-utils bzip2 >&2
	fi
	archive=$(compgen -G '/usr/src/linux-source-*.tar.*' | sort -V | tail -n 1) || true
	[ -n "$archive" ] || return 0
	mkdir -p build/linux
	tar -xf "$archive" -C build/linux --strip-components=1 \
		--wildcards '*/tools/lib' '*/tools/include' '*/tools/scripts' '*/tools/build' '*/tools/arch' \
		'*/include/uapi' '*/scripts'
	make -s -C build/linux/tools/lib/bpf DESTDIR="$DEPS" prefix=/usr install install_headers >&2
}

is_debian() { (. /etc/os-release && [ "$ID" = debian ]); }

libbpf() {
	local found candidate codename
	found=$(libbpf_version libbpf.so.1)
	if new_enough "$found" && [ -e /usr/include/bpf/bpf_helpers.h ]; then
		return
	fi
	if [ -n "$(find_libbpf)" ] && new_enough "$(libbpf_version "$(find_libbpf)")"; then
		return
	fi
	if [ "$(id -u)" -eq 0 ] && has apt-get; then
		candidate=$(apt-cache policy libbpf-dev | sed -n 's/ *Candidate: \(.*:\)\?//p')
		if new_enough "$candidate"; then
			with_apt libbpf-dev
			return
		fi
	elif [ "$(id -u)" -eq 0 ] && has dnf; then
		dnf install -y -q libbpf-devel >&2
		new_enough "$(libbpf_version libbpf.so.1)" && return
	fi
	say "libbpf $found is older than $LIBBPF_MIN or lacks its headers: fetching a newer one into build/deps"
	has apt-get || {
		say "no libbpf >= $LIBBPF_MIN could be had: install it, with its headers"
		exit 3
	}
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
	{ is_debian && from_suite "$codename-backports" libbpf1 libbpf-dev; } || from_kernel_source
	new_enough "$(libbpf_version "$(find_libbpf)")" || {
		say "no libbpf >= $LIBBPF_MIN could be had"
		exit 3
	}
}

# For setup.py (PAGECACHE_BPF_SYSROOT) and, under qemu, for whoever tries what it makes.
arm64() {
	local DEPS=$PWD/build/arm64 ARCHITECTURE=arm64
	[ -e "$DEPS/.complete" ] && return
	say "fetching Debian 12's libbpf and Python for arm64 into build/arm64"
	rm -rf "$DEPS" && mkdir -p "$DEPS"
	from_suite bookworm-backports libbpf1 libbpf-dev
	from_suite bookworm libelf1 zlib1g libc6 libexpat1 libffi8 libgcc-s1 libssl3 \
		python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
	touch "$DEPS/.complete"
}

# The Prometheus server and promtool, for tests.  Unpacked and not installed: the package would
# start a service that nobody asked for, on a port that an own one may have.
prometheus() {
	[ -x "$DEPS/prometheus/bin/prometheus" ] && [ -x "$DEPS/prometheus/bin/promtool" ] && return
	local packages=(prometheus)
	say "unpacking Debian's prometheus into build/deps/prometheus"
	rm -rf build/prometheus && mkdir -p build/prometheus "$DEPS/prometheus/bin"
	apt-cache show prometheus >/dev/null 2>&1 || apt-get -qq update
	# Debian 13 has promtool in a package of its own.
	apt-cache show promtool >/dev/null 2>&1 && packages+=(promtool)
	(cd build/prometheus && apt-get -qq -o APT::Sandbox::User=root download "${packages[@]}" >&2)
	for deb in build/prometheus/*.deb; do
		dpkg -x "$deb" build/prometheus
	done
	mv build/prometheus/usr/bin/prom* "$DEPS/prometheus/bin/"
	rm -rf build/prometheus
}

# unpack PACKAGE: into build/deps/PACKAGE.  Not installed: its package would start a service that nobody
# asked for, and Debian's containerd does not go with Docker's.
unpack() {
	say "unpacking Debian's $1 into build/deps/$1"
	apt-cache show "$1" >/dev/null 2>&1 || apt-get -qq update
	rm -rf "build/$1" && mkdir -p "build/$1" "$DEPS/$1"
	(cd "build/$1" && apt-get -qq -o APT::Sandbox::User=root download "$1" >&2)
	dpkg -x "build/$1"/*.deb "$DEPS/$1"
	rm -rf "build/$1"
}

# The programs of the kernel's NFS server, for the guest.
nfs_server() {
	has exportfs && has rpc.mountd && has rpc.nfsd && return
	[ -x "$DEPS/nfs-kernel-server/usr/sbin/rpc.nfsd" ] || unpack nfs-kernel-server
}

# What else runs containers.
containers() {
	has containerd && has ctr && has containerd-shim-runc-v2 && return
	[ -x "$DEPS/containerd/usr/bin/containerd" ] || unpack containerd
}

# environment DIRECTORY EXTRAS
environment() {
	local venv=$1 stamp=$1/.installed
	if [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ]; then
		return
	fi
	say "making the virtual environment ${venv#"$PWD/"}"
	[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
	"$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".[$2]" >&2
	touch "$stamp"
}

mkdir -p build
packages
libbpf
if role arm64; then
	arm64
fi
if role containers; then
	containers
fi
if role demo; then
	environment "$PWD/build/venv-demo" cli,templates,demo
fi
if role test; then
	prometheus
	nfs_server
	environment "$VENV" all,test,demo,docs
fi
