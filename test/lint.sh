#!/bin/bash
# gofmt, go vet and staticcheck over the whole tree.
set -euo pipefail
cd "$(dirname "$0")/.."
unformatted=$(gofmt -l $(git ls-files -co --exclude-standard '*.go'))
[ -z "$unformatted" ] || { echo "not formatted by gofmt:"; echo "$unformatted"; exit 1; }
go vet ./...
tools=$(go env GOCACHE)/banger-tools
GOBIN=$tools go install honnef.co/go/tools/cmd/staticcheck@v0.8.2
"$tools/staticcheck" ./...
