#!/bin/bash
# Generates the Go code of the API. With "check" it only compares.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.
[ "${1:-}" = check ] && { out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; }
tools=$(go env GOCACHE)/banger-tools
GOBIN=$tools go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$tools go install connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1
PATH=$tools:$PATH protoc -I api --go_out="$out" --go_opt=module=banger \
  --connect-go_out="$out" --connect-go_opt=module=banger,simple api/banger/v1/banger.proto
if [ "$out" != . ]; then
  diff -r -x '*.proto' "$out/api/banger" api/banger || { echo "generated code is stale: run make generate" >&2; exit 1; }
fi
