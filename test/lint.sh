#!/bin/bash
# gofmt, go vet and staticcheck over the whole tree.
set -euo pipefail
cd "$(dirname "$0")/.."
unformatted=$(gofmt -l $(git ls-files -co --exclude-standard '*.go'))
[ -z "$unformatted" ] || { echo "not formatted by gofmt:"; echo "$unformatted"; exit 1; }
# In a copy of what git has or would take, where nothing was built: it must work in a
# fresh clone.
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
git ls-files -z -co --exclude-standard | xargs -0 cp --parents -t "$clone"
(cd "$clone" && go vet ./...)
tools=$(go env GOCACHE)/banger-tools
GOBIN=$tools go install honnef.co/go/tools/cmd/staticcheck@v0.8.2
"$tools/staticcheck" ./...
