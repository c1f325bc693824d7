#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Get a Kubernetes for `make test-cluster` into build/cluster: kubernetes.sh [BINARY...]
#
# Debian 12's source package `kubernetes` (1.20, with all that it imports) is compiled with Debian's
# Go 1.19; etcd, containerd and the compiler are unpacked from Debian's packages and not installed,
# since their packages would start services that nobody asked for.  Some minutes of one CPU, 3 GB;
# what is there already is not made again.  No root is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build
TOP=$(readlink -f build/cluster)
mkdir -p "$TOP"
BINARIES=(${*:-kube-apiserver kube-scheduler kube-controller-manager kubelet kube-proxy kubectl})

say() { printf '== %s\n' "$*" >&2; }

# The machine's own mirror, asked for Debian 12's main, sources included: no line of /etc/apt changes.
private_apt() {
	rm -rf "$TOP/apt" && mkdir -p "$TOP/apt/lists/partial" "$TOP/apt/archives/partial"
	python3 - >"$TOP/apt/private.sources" <<'PY'
import pathlib, re, sys
for path in sorted(pathlib.Path("/etc/apt").glob("sources.list*/**/*")) + [pathlib.Path("/etc/apt/sources.list")]:
    if not path.is_file() or path.suffix not in (".list", ".sources"):
        continue
    match = re.search(r"^(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+/debian/?)(?:\s|$)", path.read_text(), re.M)
    if match:
        print(f"Types: deb deb-src\nURIs: {match[1]}\nSuites: bookworm\nComponents: main\n"
              "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg")
        sys.exit()
sys.exit("no Debian mirror found in /etc/apt: build/cluster/bin can be filled by hand instead")
PY
	APT=(apt-get -qq -o "Dir::Etc::sourcelist=$TOP/apt/private.sources" -o Dir::Etc::sourceparts=/nonexistent
		-o "Dir::State::lists=$TOP/apt/lists" -o "Dir::Cache::archives=$TOP/apt/archives"
		-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
	"${APT[@]}" update >&2
}

# etcd, containerd with its shim and runc, and the compiler, unpacked below packages/.
packages() {
	[ -e "$TOP/packages/.complete" ] && return
	say "unpacking Debian's etcd, containerd and Go into build/cluster/packages"
	rm -rf "$TOP/packages" "$TOP/debs" && mkdir -p "$TOP/packages" "$TOP/debs"
	(cd "$TOP/debs" && "${APT[@]}" download etcd-server containerd runc containernetworking-plugins \
		golang-1.19-go golang-1.19-src >&2)
	local deb
	for deb in "$TOP"/debs/*.deb; do
		dpkg -x "$deb" "$TOP/packages"
	done
	rm -rf "$TOP/debs"
	touch "$TOP/packages/.complete"
}

# The Go workspace of old, which this release still builds in: GOPATH/src/k8s.io/kubernetes.
sources() {
	local source=$TOP/go/src/k8s.io/kubernetes
	[ -e "$source/.complete" ] && return
	say "fetching and unpacking Debian's source of Kubernetes"
	rm -rf "$source" "$TOP/source" && mkdir -p "$TOP/source" "$source"
	(cd "$TOP/source" && "${APT[@]}" source --download-only kubernetes >&2)
	tar -xf "$TOP"/source/kubernetes_*.orig.tar.* -C "$source" --strip-components=1
	tar -xf "$TOP"/source/kubernetes_*.debian.tar.* -C "$source"
	local patch
	if [ -e "$source/debian/patches/series" ]; then
		while read -r patch; do
			[[ $patch =~ ^(#|$) ]] || patch -s -p1 -d "$source" -i "$source/debian/patches/${patch%% *}"
		done <"$source/debian/patches/series"
	fi
	touch "$source/.complete"
}

compile() {
	local source=$TOP/go/src/k8s.io/kubernetes name version
	export GOROOT=$TOP/packages/usr/lib/go-1.19 GOPATH=$TOP/go GOCACHE=$TOP/gocache GO111MODULE=off CGO_ENABLED=0
	version=$(sed -n "1s/^kubernetes (\([0-9.]*+really\)\?\([0-9.]*\).*/\2/p" "$source/debian/changelog")
	local stamp='' package
	for package in component-base/version client-go/pkg/version; do
		package=k8s.io/kubernetes/vendor/k8s.io/$package
		stamp+=" -X $package.gitVersion=v$version -X $package.gitMajor=1 -X $package.gitMinor=20"
	done
	mkdir -p "$TOP/bin"
	cd "$source"
	for name in "$@"; do
		if [ "$name" = kube-apiserver ] && [ ! -e pkg/generated/openapi/zz_generated.openapi.go ]; then
			openapi
		fi
		say "compiling $name $version"
		# Without clouds' and Docker's own code: half of what would be compiled.
		"$GOROOT/bin/go" build -tags providerless,dockerless -ldflags "-s -w $stamp" -o "$TOP/bin/.$name" "./cmd/$name"
		mv "$TOP/bin/.$name" "$TOP/bin/$name"
	done
}

# The one generated file that the source lacks.
openapi() {
	say "generating the API's description"
	"$GOROOT/bin/go" build -o "$TOP/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
	local directories
	directories=$(grep -rl --include=*.go '+k8s:openapi-gen=' vendor/k8s.io staging/src/k8s.io pkg 2>/dev/null |
		xargs -n 1 dirname | sed 's#^staging/src/#vendor/#' | sort -u | sed 's#^#k8s.io/kubernetes/#')
	"$TOP/openapi-gen" -O zz_generated.openapi --go-header-file hack/boilerplate/boilerplate.generatego.txt \
		--input-dirs "$(paste -sd, <<<"$directories")" --output-package k8s.io/kubernetes/pkg/generated/openapi \
		--report-filename "$TOP/openapi-violations.txt" --output-base "$GOPATH/src" >&2
}

missing=()
for name in "${BINARIES[@]}"; do
	[ -x "$TOP/bin/$name" ] || missing+=("$name")
done
if [ ${#missing[@]} -gt 0 ] || [ ! -e "$TOP/packages/.complete" ]; then
	private_apt
	packages
	sources
	[ ${#missing[@]} -eq 0 ] || compile "${missing[@]}"
fi
