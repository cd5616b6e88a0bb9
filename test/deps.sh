#!/bin/bash
# Installs the Debian packages that building and running banger needs, when run as
# root. Otherwise prints the one command that does, and fails. With "test" also what only
# the tests need; with "go" it only looks for a Go that can build banger.
set -euo pipefail
cd "$(dirname "$0")/.."

# the least version
want_go=$(sed -n 's/^go //p' go.mod)

go=${GO:-go}
go_problem=
if ! command -v "$go" >/dev/null; then
  go_problem="no $go is in PATH"
else
  have_go=$("$go" env GOVERSION | sed 's/^go//')
  [ "$(printf '%s\n' "$want_go" "$have_go" | sort -V | head -1)" = "$want_go" ] || go_problem="this is go $have_go"
fi
[ -z "$go_problem" ] || echo "banger needs Go $want_go or newer, and $go_problem: see https://go.dev/doc/install" >&2
[ "${1:-}" != go ] || { [ -z "$go_problem" ]; exit; }

declare -A package=(
  [git]=git [make]=make [qemu-system-x86_64]=qemu-system-x86 [qemu-img]=qemu-utils
  [mmdebstrap]=mmdebstrap [newuidmap]=uidmap [mkfs.ext4]=e2fsprogs [depmod]=kmod
  [xz]=xz-utils [zstd]=zstd
)
# What only the tests need: the race detector wants a C compiler.
[ "${1:-}" = test ] && package+=([gcc]="gcc libc6-dev" [python3]=python3 [pip3]=python3-pip [mkfs.xfs]=xfsprogs [protoc]="protobuf-compiler libprotobuf-dev" [cpio]=cpio [ip]=iproute2)

PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=(${package[$program]})
done
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)

if [ ${#missing[@]} -gt 0 ]; then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  if [ "$(id -u)" -ne 0 ]; then
    echo "banger needs packages that are not installed. Run:" >&2
    echo "  sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  echo "installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[ -z "$go_problem" ]
