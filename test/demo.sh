#!/bin/bash
# The main job of banger, in a real guest, on a scratch repository: up, a command, a
# connection that is refused, a change made inside, diff, apply, rm. Uses a state directory of its own below
# ${XDG_CACHE_HOME:-~/.cache}/banger-demo, which keeps kernel and image for the next
# time; the VM, the repository and the daemon are gone at the end.
set -euo pipefail

export BANGER_STATE_DIR=${BANGER_DEMO_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/banger-demo}
mkdir -p "$BANGER_STATE_DIR"
# Not below /tmp or /var/tmp: the guest would have it at another place.
scratch=$(mktemp -d "$BANGER_STATE_DIR-repository.XXXXXX")
repo=$scratch/shop

cleanup() {
  banger rm -f shop >/dev/null 2>&1 || true
  banger daemon stop >/dev/null 2>&1 || true
  rm -rf "$scratch"
}
trap cleanup EXIT

say() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; }
run() { say "$@"; "$@"; }

git init -q -b main "$repo"
cd "$repo"
git config user.name Demo
git config user.email demo@example.org
cat > greet.sh <<'SH'
#!/bin/sh
echo "hello from $(uname -n), kernel $(uname -r)"
SH
chmod +x greet.sh
printf 'test:\n\t./greet.sh\n' > Makefile
git add . && git commit -qm 'a shop'
echo '# not committed yet' >> greet.sh

run banger up -- make test
run banger exec -- curl -sS --max-time 20 http://192.168.1.1 || true
run banger logs --network
banger logs --network | grep -q 'refused tcp 192.168.1.1:80 private network'
run banger exec -- sh -c 'echo "made inside" > inside.txt; sed -i s/hello/welcome/ greet.sh; git status --short'
run banger ps
run banger diff
run banger apply
say git status --short; git status --short
[ "$(cat inside.txt)" = "made inside" ] && grep -q welcome greet.sh
run banger stop shop
run banger rm shop
[ -z "$(banger ps -q)" ]
printf '\nThe change made inside is on the host; the VM is gone.\n' >&2
