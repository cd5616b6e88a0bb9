// Package script drives the real banger and the real bangerd, each a process of its
// own, on the fake host. Each script has a state directory of its own and leaves
// nothing: no process, no VM. testdata/README says which commands scripts have.
package script

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"banger/internal/cli"
	"banger/internal/daemon/driver/fake"
	"banger/test/need"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"banger":  func() { os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Environ())) },
		"bangerd": func() { os.Exit(bangerd()) },
	})
}

func TestScript(t *testing.T) { run(t, "testdata") }

// TestRepositories are the scripts that need a mount namespace: most put repositories
// into guests, which write to /workspace, so a fake guest needs one of its own.
func TestRepositories(t *testing.T) {
	need.Need(t, "root")
	run(t, "testdata/root")
}

func run(t *testing.T, dir string) {
	programs := buildPrograms(t)
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		Setup:               func(env *testscript.Env) error { return setup(env, programs) },
		Condition:           condition,
		Cmds:                commands(),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

func commands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"exits":      exits,
		"eventually": eventually,
		"killdaemon": killDaemon,
		"repo":       repo,
		"long":       long,
		"age":        age,
		"chown":      chown,
		"scenario":   scenario,
	}
}

// setup gives a script its instance, and clears it away at the end.
func setup(env *testscript.Env, programs string) error {
	state := filepath.Join(env.WorkDir, ".state")
	bangerd, err := exec.LookPath("bangerd")
	if err != nil {
		return err
	}
	env.Setenv("BANGER_STATE_DIR", state)
	env.Setenv("BANGER_CONFIG", "")
	env.Setenv("STATE", state)
	env.Setenv("GOCOVERDIR", os.Getenv("GOCOVERDIR")) // what the programs cover counts
	env.Setenv("BANGERD", bangerd)
	env.Setenv(programsDir, programs)
	env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
	env.Setenv("TERM", "dumb")
	env.Setenv("LC_ALL", "C")
	env.Setenv("GIT_CONFIG_NOSYSTEM", "1")
	env.Defer(func() { cleanUp(env.T(), env.Vars, state, fakeHost(state, programs)) })
	return errors.Join(
		os.MkdirAll(filepath.Join(env.WorkDir, "home"), 0o700),
		os.WriteFile(filepath.Join(env.WorkDir, "home", ".gitconfig"), []byte(gitConfig), 0o600),
	)
}

const gitConfig = `[user]
	name = Ann
	email = ann@localhost
[init]
	defaultBranch = main
`

// fakeHost is the host of the script that has this state directory.
func fakeHost(state, programs string) *fake.Host {
	return fake.New(filepath.Join(filepath.Dir(state), ".host"), filepath.Join(programs, "fakevmm"))
}

// cleanUp ends what a script left running, by the commands a user has. What is left
// after them on the host or in the state directory is a failure of the script.
func cleanUp(t testscript.T, vars []string, state string, host *fake.Host) {
	if _, err := os.Stat(state); err != nil {
		return
	}
	// A script may have left a configuration that no daemon starts with, and guests that
	// do not work.
	vars = append(vars, "BANGER_CONFIG=/dev/null")
	run := func(args ...string) string {
		cmd := exec.Command("banger", args...)
		cmd.Env = vars
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Log("at the end: banger", args, err, string(out))
			t.FailNow()
		}
		return string(out)
	}
	for _, name := range strings.Fields(run("ps", "-q")) {
		run("rm", "-q", "-f", name)
	}
	run("daemon", "stop")
	left := func() string {
		files, _ := filepath.Glob(filepath.Join(state, "vms", "*"))
		return strings.TrimSpace(fmt.Sprint(processesOf(state)) + " " + strings.Join(files, " ") + " " + host.Text())
	}
	for deadline := time.Now().Add(20 * time.Second); left() != "[]"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Log("left behind:", left())
			for _, pid := range processesOf(state) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			t.FailNow()
		}
	}
}

// processesOf finds processes that work below dir or have it in their environment.
func processesOf(dir string) []int {
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	var pids []int
	for _, p := range entries {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() {
			continue
		}
		cwd, _ := os.Readlink(p + "/cwd")
		environ, _ := os.ReadFile(p + "/environ")
		if strings.HasPrefix(cwd, dir) || strings.Contains(string(environ), "BANGER_STATE_DIR="+dir+"\x00") {
			pids = append(pids, pid)
		}
	}
	return pids
}

func condition(name string) (bool, error) {
	switch name {
	case "root":
		return os.Geteuid() == 0, nil
	}
	return false, errors.New("unknown condition")
}

// exits CODE PROGRAM ARG… runs a program that must end with this exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG…")
	}
	wanted, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if code != wanted {
		ts.Fatalf("exit code %d, not %d", code, wanted)
	}
}

// eventually [!] PROGRAM ARG… repeats a command until it succeeds, or with "!" fails.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: eventually PROGRAM ARG…")
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := ts.Exec(args[0], args[1:]...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v: %v, for 20 s", args, err)
		}
	}
}

func daemonPID(ts *testscript.TestScript) int {
	ts.Check(ts.Exec("banger", "daemon", "status", "--format", "json"))
	var status struct{ Pid int }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &status))
	return status.Pid
}

// killdaemon kills bangerd and waits until it is dead.
func killDaemon(ts *testscript.TestScript, neg bool, args []string) {
	pid := daemonPID(ts)
	ts.Check(syscall.Kill(pid, syscall.SIGKILL))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("bangerd (pid %d) does not die", pid)
		}
	}
}

// repo DIR makes a git repository with one commit of what is in DIR.
func repo(ts *testscript.TestScript, neg bool, args []string) {
	for _, git := range [][]string{{"init", "-q"}, {"add", "-A"}, {"commit", "-q", "-m", "first"}} {
		ts.Check(ts.Exec("git", append([]string{"-C", args[0]}, git...)...))
	}
}

// long FILE N writes N bytes that are no text.
func long(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i * 7 >> (i % 5))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), data, 0o600))
}

// age FILE TIME sets when a file was changed, in a form that time.ParseDuration reads,
// from now.
func age(ts *testscript.TestScript, neg bool, args []string) {
	d, err := time.ParseDuration(args[1])
	ts.Check(err)
	at := time.Now().Add(d)
	ts.Check(os.Chtimes(ts.MkAbs(args[0]), at, at))
}

// chown FILE UID gives a file away; root only.
func chown(ts *testscript.TestScript, neg bool, args []string) {
	uid, err := strconv.Atoi(args[1])
	ts.Check(err)
	ts.Check(os.Lchown(ts.MkAbs(args[0]), uid, uid))
}

// scenario NAME WORD says how the guest of that name behaves, see fake.Scenario.
func scenario(ts *testscript.TestScript, neg bool, args []string) {
	host := fakeHost(ts.Getenv("BANGER_STATE_DIR"), ts.Getenv(programsDir))
	ts.Check(host.SetScenario(args[0], fake.Scenario(args[1])))
}
