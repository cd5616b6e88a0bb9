#!/bin/bash
# All tests, as CI runs them. With "quick" only those that need no guest.
#
#   BANGER_TEST_REQUIRE=root,netns,qemu   turns a skip for want of these into a failure;
#                                   image builds real images too, minutes of work
#   BANGER_TEST_CACHE=DIR           keeps kernel and image between runs
set -euo pipefail
# Who starts this may ignore signals, as nohup does, and the tests send them.
[ -n "${BANGER_TEST_SIGNALS:-}" ] || exec env --default-signal BANGER_TEST_SIGNALS=default "$0" "$@"
cd "$(dirname "$0")/.."
quick=${1:-}
least=60 # per cent of statements

step() { printf '\n== %s\n' "$*"; }

step "format, vet, staticcheck"
test/lint.sh
if command -v protoc >/dev/null; then
  step "generated code"
  test/generate.sh check
fi

step "tests"
cover=$(mktemp -d)
trap 'rm -rf "$cover"' EXIT
# The race detector needs cgo; what is built for use does not.
packages=$(go list ./... | grep -vE '^banger/test/(vm|daemon|flood)$')
CGO_ENABLED=1 go test -race -timeout 20m -coverpkg=./internal/... -coverprofile="$cover/unit" $packages
step "the daemon on the fake host"
# Without the race detector: it starts a thousand daemons.
go test -timeout 15m -covermode=atomic -coverpkg=./internal/... -coverprofile="$cover/daemon" ./test/daemon
step "a guest that attacks its network"
go test -count=1 -v -timeout 10m ./test/flood # it measures memory, which the race detector changes
if [ -z "$quick" ]; then
  step "real guests"
  go test -count=1 -v -timeout 40m ./test/vm
fi

step "coverage"
# Generated code and test support are not counted.
grep -vE '\.pb\.go|\.connect\.go|/driver/fake/|/conformance/|/imagetest/' <(cat "$cover/unit"; tail -n +2 "$cover/daemon") > "$cover/counted"
total=$(go tool cover -func="$cover/counted" | awk '/^total:/ {sub("%", "", $3); print $3}')
echo "total statement coverage: $total% (at least $least%)"
awk -v total="$total" -v least="$least" 'BEGIN { exit !(total >= least) }' || {
  echo "coverage is below $least%" >&2
  exit 1
}
