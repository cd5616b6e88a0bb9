package structure

import (
	"fmt"
	"strings"
	"testing"
)

// TestVariableRule: each line is a declaration, and whether it is refused.
func TestVariableRule(t *testing.T) {
	for decl, refused := range map[string]bool{
		`var ErrX = errors.New("x")`:                        false,
		`var errX = fmt.Errorf("x: %w", y)`:                 false,
		`var errX = &api.Error{Code: api.Busy}`:             false,
		`var _ fmt.Stringer = (*T)(nil)`:                    false,
		`var re = regexp.MustCompile("x")`:                  false,
		`var dirs = [...]string{"a", "b"}`:                  false,
		`var dirs [2]string = [2]string{"a", "b"}`:          false,
		"//go:embed x\nvar files embed.FS":                  false,
		"var (\n\t//go:embed x\n\tfiles embed.FS\n)":        false,
		`const limit = 3`:                                   false,
		`var limit = 3`:                                     true,
		`var names = []string{"a"}`:                         true,
		`var table = map[string]int{"a": 1}`:                true,
		`var mu sync.Mutex`:                                 true,
		`var now = time.Now`:                                true,
		`var x [4]int`:                                      true,
		`var notAnError = errors.New("x")`:                  true,
		`var errX error`:                                    true,
		`var errX = &config{}`:                              true,
		`var dev, prod = "a", "b"`:                          true,
		"var (\n\tErrX = errors.New(\"x\")\n\tcount int\n)": true,
		"// go:embed x is what this is not\nvar f embed.FS": true,
	} {
		got := checkVariables(example(t, "internal/x/x.go", "package x\n"+decl+"\n"))
		if (len(got) > 0) != refused {
			t.Errorf("%s: %v", decl, got)
		}
	}
	if got := checkVariables(example(t, "internal/x/x_test.go", "package x\nvar limit = 3\n")); len(got) != 0 {
		t.Errorf("in a test: %v", got)
	}
}

func TestProcessRule(t *testing.T) {
	for _, c := range []struct {
		path, imp, body string
		refused         bool
	}{
		{"internal/daemon/hostcmd/x.go", `"os/exec"`, `exec.Command("ls")`, false},
		{"internal/daemon/vm/x_test.go", `"os/exec"`, `exec.Command("ls")`, false},
		{"internal/daemon/vm/x.go", `"os/exec"`, `_ = exec.ErrNotFound`, false},
		{"internal/daemon/vm/x.go", `"os/exec"`, `exec.LookPath("ls")`, false},
		{"internal/daemon/vm/x.go", `"os"`, `os.Open("x")`, false},
		{"internal/daemon/vm/x.go", `"os/exec"`, `exec.Command("ls")`, true},
		{"internal/daemon/vm/x.go", `"os/exec"`, `_ = exec.Cmd{}`, true},
		{"internal/daemon/vm/x.go", `run "os/exec"`, `run.CommandContext(nil, "ls")`, true},
		{"internal/daemon/vm/x.go", `. "os/exec"`, `Command("ls")`, true},
		{"internal/daemon/vm/x.go", `"os"`, `os.StartProcess("ls", nil, nil)`, true},
		{"internal/daemon/vm/x.go", `"syscall"`, `syscall.ForkExec("ls", nil, nil)`, true},
		{"internal/cli/x.go", `"golang.org/x/sys/unix"`, `unix.Exec("ls", nil, nil)`, true},
		{"cmd/banger/main.go", `"os/exec"`, `exec.Command("ls")`, true},
	} {
		got := checkProcesses(example(t, c.path, "package x\nimport "+c.imp+"\nfunc f() { "+c.body+" }\n"))
		if (len(got) > 0) != c.refused {
			t.Errorf("%s: %s: %v", c.path, c.body, got)
		}
	}
}

func TestLengthRule(t *testing.T) {
	function := func(lines int) string { return "func f() {\n" + strings.Repeat("\tg()\n", lines-2) + "}\n" }
	for _, c := range []struct {
		text    string
		refused bool
	}{
		{"package x\n" + function(maxFunction), false},
		{"package x\n" + function(maxFunction+1), true},
		{"package x\n" + strings.Repeat("// x\n", maxFile-1), false},
		{"package x\n" + strings.Repeat("// x\n", maxFile), true},
		{"// Package x: the comment on a function is not counted.\npackage x\n" + strings.Repeat("// f\n", 50) + function(maxFunction), false},
	} {
		if got := checkLengths(example(t, "internal/x/x.go", c.text)); (len(got) > 0) != c.refused {
			t.Errorf("%d lines: %v", strings.Count(c.text, "\n"), got)
		}
	}
}

func TestSurfaceRule(t *testing.T) {
	good := `package daemon
type Daemon struct{}
type Option func()
type Build struct{}
func Open(opts ...Option) (*Daemon, error) { return nil, nil }
func (d *Daemon) Serve() error { return nil }
func (d *Daemon) Close() error { return nil }
func Doctor() {}
func WithX(x int) Option { return nil }
type service struct{}
func (s service) List() {}
`
	for extra, want := range map[string]string{
		"":                                    "",
		"func (d *Daemon) VMs() {}":           "exports Daemon.VMs",
		"func WithNothing() int { return 0 }": "exports WithNothing",
		"type Manager struct{}":               "exports Manager",
		"const Limit = 3":                     "exports Limit",
		"func Helper() {}":                    "exports Helper",
	} {
		got := checkSurface([]source{example(t, "internal/daemon/x.go", good+extra+"\n")})
		if want == "" && len(got) != 0 || want != "" && (len(got) != 1 || !strings.Contains(got[0], want)) {
			t.Errorf("%s: %v", extra, got)
		}
	}
	without := strings.Replace(good, "func Doctor() {}\n", "", 1)
	if got := checkSurface([]source{example(t, "internal/daemon/x.go", without)}); len(got) != 1 || !strings.Contains(got[0], "does not export Doctor") {
		t.Errorf("without Doctor: %v", got)
	}
}

func TestTextRule(t *testing.T) {
	for text, refused := range map[string]bool{
		"see docs/layout.md": false, "/workspace/shop": false, "/tmp/x": false,
		"see /work" + "/x": true, "a\n/tmp/" + "plan": true,
	} {
		got := checkText("x", []byte(text))
		if (len(got) > 0) != refused {
			t.Errorf("%q: %v", text, got)
		}
		if refused && !strings.HasPrefix(got[0], fmt.Sprintf("x:%d: ", 1+strings.Count(text, "\n"))) {
			t.Errorf("%q: %v", text, got)
		}
	}
}
