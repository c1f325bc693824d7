#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what building, testing and the demo need: Debian packages (as root, only those that are
# missing), a virtual environment in build/venv, and in build/deps the Prometheus server for tests
# and libbpf >= 1.4 where the system's is older.  The system's own package sources are used and
# left as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(
	bc busybox-static clang dmsetup dwarves e2fsprogs gcc kmod libc6-dev libelf1
	linux-headers-6.12-amd64 linux-image-6.12-amd64 make openssl python3 python3-bpfcc
	python3-venv qemu-system-x86 qemu-utils vmtouch xfsprogs
)
LIBBPF_MIN=1.4
DEPS=$PWD/build/deps
VENV=$PWD/build/venv

say() { printf '== %s\n' "$*" >&2; }

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

packages() {
	local missing=()
	for package in "${PACKAGES[@]}"; do
		installed "$package" || missing+=("$package")
	done
	if [ ${#missing[@]} -eq 0 ]; then
		return
	fi
	if [ "$(id -u)" -ne 0 ]; then
		say "not installed: ${missing[*]}"
		say "run 'make deps' as root, or install them yourself"
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
		-o APT::Sandbox::User=root
	)
	apt-get -qq "${options[@]}" update >&2
	(cd "$apt/debs" && apt-get -qq "${options[@]}" download "$@" >&2)
	for deb in "$apt"/debs/*.deb; do
		dpkg -x "$deb" "$DEPS"
	done
}

# Debian's kernel source carries libbpf in tools/lib/bpf, as new as the kernel.
from_kernel_source() {
	say "building libbpf from the kernel's source package"
	[ "$(id -u)" -eq 0 ] && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
		--no-install-recommends linux-source-6.12 libelf-dev zlib1g-dev pkg-config >&2
	mkdir -p build/linux
	tar -xf /usr/src/linux-source-6.12.tar.* -C build/linux --strip-components=1 \
		--wildcards '*/tools/lib' '*/tools/include' '*/tools/scripts' '*/tools/build' '*/tools/arch' \
		'*/include/uapi' '*/scripts'
	make -s -C build/linux/tools/lib/bpf DESTDIR="$DEPS" prefix=/usr install install_headers >&2
}

libbpf() {
	local found
	found=$(libbpf_version libbpf.so.1)
	if new_enough "$found" && [ -e /usr/include/bpf/bpf_helpers.h ]; then
		return
	fi
	if [ -n "$(find_libbpf)" ] && new_enough "$(libbpf_version "$(find_libbpf)")"; then
		return
	fi
	say "libbpf $found is older than $LIBBPF_MIN or lacks its headers: fetching a newer one into build/deps"
	local codename
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
	from_suite "$codename-backports" libbpf1 libbpf-dev || from_kernel_source
	new_enough "$(libbpf_version "$(find_libbpf)")" || {
		say "no libbpf >= $LIBBPF_MIN could be had"
		exit 3
	}
}

# The Prometheus server and promtool, for tests.  Unpacked and not installed: the package would
# start a service that nobody asked for, on a port that an own one may have.
prometheus() {
	[ -x "$DEPS/prometheus/bin/promtool" ] && return
	say "unpacking Debian's prometheus into build/deps/prometheus"
	rm -rf build/prometheus && mkdir -p build/prometheus "$DEPS/prometheus/bin"
	apt-cache show prometheus >/dev/null 2>&1 || apt-get -qq update
	(cd build/prometheus && apt-get -qq -o APT::Sandbox::User=root download prometheus >&2)
	dpkg -x build/prometheus/*.deb build/prometheus
	mv build/prometheus/usr/bin/prom* "$DEPS/prometheus/bin/"
	rm -rf build/prometheus
}

environment() {
	local stamp=$VENV/.installed
	if [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ]; then
		return
	fi
	say "making the virtual environment build/venv"
	[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
	"$VENV/bin/python" -m pip install -q --disable-pip-version-check -e '.[test,demo,docs,export]' >&2
	touch "$stamp"
}

mkdir -p build
packages
libbpf
prometheus
environment
