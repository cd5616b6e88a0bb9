# banger: `make demo` runs the main job in a real guest, `make test` all tests.
# `make help` lists the rest.

SHELL := /bin/bash
.DELETE_ON_ERROR:

# One set of flags for everything: other flags mean another build cache.
export GOFLAGS := -trimpath -buildvcs=false -mod=readonly
export CGO_ENABLED ?= 0
GO ?= go
PROGRAMS := cmd/bangerd/programs

.PHONY: help build demo test test-quick lint generate deps test-deps toolchain bench bench-host test-host test-host-shell soak clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

build: bin/banger bin/bangerd ## bin/banger and bin/bangerd, static

# All are built each time: go knows what has changed.
bin/banger: toolchain
	@$(GO) build -ldflags '-s -w' -o $@ ./cmd/banger
# What bangerd runs, and the guest, is embedded in bangerd.
bin/bangerd: $(PROGRAMS)/banger-shim $(PROGRAMS)/banger-guest $(PROGRAMS)/banger-net toolchain
	@$(GO) build -ldflags '-s -w' -o $@ ./cmd/bangerd
$(PROGRAMS)/%: toolchain
	@$(GO) build -ldflags '-s -w' -o $@ ./cmd/$*

demo: deps build ## the main job in a real guest: up, a command, a change, diff, apply, rm
	@PATH="$(CURDIR)/bin:$$PATH" test/demo.sh

test: test-deps build ## everything that CI runs
	@test/run.sh

test-quick: build ## all tests but those with real guests
	@test/run.sh quick

lint: ## gofmt, go vet, staticcheck
	@test/lint.sh

generate: ## the code generated from api/banger/v1/banger.proto
	@test/generate.sh

bench: deps build ## banger against the bare thing, in interleaved pairs
	@$(GO) run ./test/bench

bench-host: test-deps build bin/testhost ## banger in Firecracker against the same by hand, in the test host
	@$(GO) build -o bin/bench ./test/bench
	@bin/testhost run -timeout 60m -- /host/bin/bench -bin /host/bin -n 10

test-host: test-deps build bin/testhost ## the tests that need KVM, device-mapper and systemd, in a test host
	@bin/testhost test
	@bin/testhost test -reboot orderly
	@bin/testhost test -reboot cut

test-host-shell: test-deps build bin/testhost ## a root shell in the test host
	@bin/testhost shell

soak: test-deps build bin/testhost ## every kill and 200 lifecycles in the test host, an hour or more
	@$(GO) test -c -o bin/soak.test ./test/vm
	@bin/testhost run -timeout 6h -- sh -c 'cd /host/tree/test/vm && \
		BANGER_TEST_SOAK=1 exec /host/bin/soak.test -test.v -test.timeout 6h -test.run "^TestSystem(Kills|Lifecycles)$$"'

# Not go run, which knows no exit code but 1.
bin/testhost: toolchain
	@$(GO) build -o $@ ./test/host/testhost

toolchain:
	@test/deps.sh go

test-deps:
	@test/deps.sh test

deps: ## install what is missing (as root), or print the one command that does
	@test/deps.sh

clean: ## remove what was built here
	rm -rf bin $(PROGRAMS)/banger-shim $(PROGRAMS)/banger-guest $(PROGRAMS)/banger-net
