// Package need is how a test says what it needs of the machine. A test that the
// machine cannot serve is skipped by name; BANGER_TEST_REQUIRE, a list like
// "root,netns,qemu,testhost", turns the skip into a failure, so that a CI that
// means to have something cannot lose it unseen.
package need

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Need skips the test, or fails it, when the machine lacks what:
//
//	root      the test runs as uid 0 with the right to mount
//	cgroup2   it may make a cgroup of version 2, wherever that is mounted
//	netns     it may make a network namespace, and has ip to furnish it
//	qemu      there is a qemu-system-x86_64 in PATH
//	node      there are node, and npm in one directory with all that it needs
//	testhost  it runs inside the test host: BANGER_TEST_HOST is set
//	reboot    it runs there twice, before and after a reboot: BANGER_TEST_BOOT is 1, then 2,
//	          and BANGER_TEST_REBOOT is orderly, or cut for a power cut
func Need(t testing.TB, what string) {
	t.Helper()
	have, known := probe(what)
	if !known {
		t.Fatalf("need: nobody knows how to ask for %q", what)
	}
	if have {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("BANGER_TEST_REQUIRE"), ","), what) {
		t.Fatalf("needs %s, which BANGER_TEST_REQUIRE promises and this machine lacks", what)
	}
	t.Skipf("needs %s", what)
}

func probe(what string) (have, known bool) {
	switch what {
	case "root":
		return canUnshare(syscall.CLONE_NEWNS), true
	case "cgroup2":
		mounts, err := os.ReadFile("/proc/mounts")
		return err == nil && strings.Contains(string(mounts), " cgroup2 rw") && canUnshare(syscall.CLONE_NEWNS), true
	case "netns":
		_, err := exec.LookPath("ip")
		return err == nil && canUnshare(syscall.CLONE_NEWNET), true
	case "qemu":
		_, err := exec.LookPath("qemu-system-x86_64")
		return err == nil, true
	case "node":
		return hasNode(), true
	case "testhost":
		return os.Getenv("BANGER_TEST_HOST") != "", true
	case "reboot":
		return os.Getenv("BANGER_TEST_REBOOT") != "", true
	}
	return false, false
}

// hasNode is false for an npm whose parts are packages of their own, as Debian has it.
func hasNode() bool {
	if _, err := exec.LookPath("node"); err != nil {
		return false
	}
	npm, err := exec.LookPath("npm")
	if err == nil {
		npm, err = filepath.EvalSymlinks(npm) // NPM/bin/npm-cli.js
	}
	if err != nil {
		return false
	}
	_, err = os.Stat(filepath.Join(filepath.Dir(npm), "../node_modules/pacote"))
	return err == nil
}

// canUnshare tries in a thread that ends with the goroutine, because it is locked
// to it for good.
func canUnshare(flags int) bool {
	result := make(chan bool, 1)
	go func() {
		runtime.LockOSThread()
		result <- os.Getuid() == 0 && syscall.Unshare(flags) == nil
	}()
	return <-result
}
