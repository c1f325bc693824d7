# SPDX-License-Identifier: Apache-2.0
# Packages of Debian without changing this machine's: to be sourced, after tools/logged.sh.

# Where this machine gets Debian from: MIRROR and SECURITY.  Kernels of a stable release come as
# security updates, too.
archives=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
	sed -n 's/^Debian //p' | sort -u)
MIRROR=$(grep -v security <<<"$archives" | head -n 1)
SECURITY=$(grep security <<<"$archives" | head -n 1 || true)
[ -n "$MIRROR" ] || {
	say "apt on this machine knows no Debian archive"
	exit 4
}

# sources SUITE: the lines of a list of sources.
sources() {
	local keys=/usr/share/keyrings/debian-archive-keyring.gpg
	printf "deb [signed-by=$keys] $MIRROR %s main\n" "$1" "$1-backports"
	[ -z "$SECURITY" ] || echo "deb [signed-by=$keys] $SECURITY $1-security main"
}

# apt_private DIRECTORY SUITE ARCHITECTURE: DIRECTORY/apt/conf is for APT_CONFIG.
apt_private() {
	local directory=$1 suite=$2 architecture=$3
	mkdir -p "$directory"/apt/{etc/preferences.d,state/lists/partial,cache/archives/partial}
	: >"$directory/apt/state/status"
	sources "$suite" >"$directory/apt/etc/sources.list"
	cat >"$directory/apt/conf" <<-CONF
		Dir::Etc "$directory/apt/etc"; Dir::Etc::parts "/dev/null"; Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::sourcelist "$directory/apt/etc/sources.list"; Dir::State "$directory/apt/state";
		Dir::State::status "$directory/apt/state/status"; Dir::Cache "$directory/apt/cache";
		APT::Sandbox::User "root";
		APT::Architecture "$architecture"; APT::Architectures "$architecture";
	CONF
}
