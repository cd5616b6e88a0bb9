package cli

import (
	"io"
	"slices"
	"strings"
	"time"

	"banger/internal/config"
)

// Main runs banger with args, which lack the program's name, and returns the exit
// code. env is the environment as KEY=VALUE. A stream counts as a terminal only when
// it is an *os.File.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer, env []string) int {
	a := newApp(stdin, stdout, stderr, env)
	a.signals = watchSignals(osSignals)
	defer a.signals.stop()
	return a.run(args)
}

// app is one run of banger: what the commands share.
type app struct {
	stdin   io.Reader
	stdout  io.Writer
	ui      *ui // all of stderr
	env     environment
	signals *signals
	now     func() time.Time
	layout  func() (config.Layout, error)
	doctor  doctorFunc

	json    bool
	noColor bool
}

func newApp(stdin io.Reader, stdout, stderr io.Writer, env []string) *app {
	return &app{
		stdin: stdin, stdout: stdout, ui: newUI(stderr), env: env,
		now: time.Now, layout: config.Dir, doctor: hostDoctor,
	}
}

func (a *app) run(args []string) int {
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.ui)
	cmd, err := root.ExecuteContextC(a.signals.soft)
	return a.finish(cmd, err)
}

// environment is a list of KEY=VALUE; of several the last one wins.
type environment []string

func (e environment) get(key string) string {
	value, _ := e.lookup(key)
	return value
}

func (e environment) lookup(key string) (string, bool) {
	for _, kv := range slices.Backward(e) {
		if k, v, ok := strings.Cut(kv, "="); ok && k == key {
			return v, true
		}
	}
	return "", false
}

// with returns e with key set to value.
func (e environment) with(key, value string) environment {
	return append(slices.Clone(e), key+"="+value)
}
