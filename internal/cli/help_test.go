package cli

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func tree(t *testing.T) *cobra.Command {
	t.Helper()
	return newApp(strings.NewReader(""), io.Discard, io.Discard, nil).rootCommand()
}

func walk(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, child := range cmd.Commands() {
		walk(child, visit)
	}
}

// TestEveryCommandHasHelp is the rule of docs: a one-line and a long help, an example,
// exit codes, and a word on each flag.
func TestEveryCommandHasHelp(t *testing.T) {
	n := 0
	walk(tree(t), func(cmd *cobra.Command) {
		n++
		path := cmd.CommandPath()
		if cmd.Short == "" || strings.Contains(cmd.Short, "\n") || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: the one-line help is %q", path, cmd.Short)
		}
		if len(cmd.Long) <= len(cmd.Short) || !strings.HasSuffix(cmd.Long, ".") {
			t.Errorf("%s: the long help is %q", path, cmd.Long)
		}
		for _, line := range strings.Split(cmd.Long, "\n") {
			if len(line) > 110 {
				t.Errorf("%s: a line of the long help is too long: %q", path, line)
			}
		}
		if !strings.HasPrefix(cmd.Example, "  banger ") && !strings.Contains(cmd.Example, "banger ") {
			t.Errorf("%s: the example is %q", path, cmd.Example)
		}
		if cmd.Annotations[exitsKey] == "" {
			t.Errorf("%s: no exit codes", path)
		}
		if cmd.RunE == nil && cmd.Run == nil {
			t.Errorf("%s does nothing", path)
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s: flag --%s has no help", path, f.Name)
			}
		})
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.InitDefaultHelpFlag()
		if err := cmd.Help(); err != nil {
			t.Fatal(err)
		}
		contains(t, path+" --help", out.String(), "Usage:\n  "+path, "Examples:\n", "Flags:\n", "Exit codes:\n", cmd.Example)
	})
	if n < 25 {
		t.Errorf("the tree has %d commands only", n)
	}
}

// TestFlags pins the flags of each verb: those that docs name, and no others.
func TestFlags(t *testing.T) {
	enter := "allow cpus deny detach/d disk env/e image include-untracked interactive/i memory name network publish/p ready rm tty/t user/u workdir/w"
	wanted := map[string]string{
		"banger":                   "format no-color quiet/q version",
		"banger up":                enter,
		"banger run":               enter,
		"banger create":            "allow cpus deny disk image memory name network no-start publish/p ready",
		"banger exec":              "env/e interactive/i tty/t user/u workdir/w",
		"banger apply":             "branch check",
		"banger stop":              "timeout",
		"banger setup firecracker": "from undo",
		"banger set":               "allow deny forget network publish/p unpublish",
		"banger ps":                "wide",
		"banger logs":              "follow/f network tail",
		"banger forward":           "detach/d",
		"banger rm":                "force/f",
		"banger workspace prepare": "include-untracked",
	}
	walk(tree(t), func(cmd *cobra.Command) {
		var flags []string
		cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) { flags = append(flags, flagName(f)) })
		cmd.PersistentFlags().VisitAll(func(f *pflag.Flag) { flags = append(flags, flagName(f)) })
		slices.Sort(flags)
		path := strings.Replace(cmd.CommandPath(), "banger vm ", "banger ", 1)
		want(t, cmd.CommandPath(), strings.Join(flags, " "), wanted[path])
	})
}

func flagName(f *pflag.Flag) string {
	if f.Shorthand == "" {
		return f.Name
	}
	return f.Name + "/" + f.Shorthand
}

// TestHelpShowsOnlyWhatWorks: the verbs of later work are not there, and what is an
// alias is not in the list.
func TestHelpShowsOnlyWhatWorks(t *testing.T) {
	d := newFake(t)
	r := d.run("--help")
	want(t, "exit code", r.code, 0)
	want(t, "stderr", r.err, "")
	for _, absent := range []string{"sync", "shell", "attach", "session", "completion", "vm ", "workspace", "inspect", "delete"} {
		if strings.Contains(r.out, "\n  "+absent) {
			t.Errorf("the help shows %q", absent)
		}
	}
	contains(t, "help", r.out, "\n  up ", "\n  apply ", "\n  set ", "\n  logs ", "\n  port ", "\n  forward ", "\n  doctor ")
	if again := d.run("help"); again.out != r.out {
		t.Errorf("help and --help differ:\n%s\n%s", again.out, r.out)
	}
	want(t, "help image pull", d.run("help", "image", "pull").out, d.run("image", "pull", "--help").out)
}

// web finds what a program says that serves pages: an address of this machine, or the
// word for what one would look at it with. Links to elsewhere are none of it.
const web = `(?i)https?://([^ /]*:\d|localhost|127\.|0\.0\.0\.0|\[)|\blocalhost\b|127\.0\.0\.1` +
	`|\b(browser|dashboard)\b|\bweb[ -]?(ui|page|interface|server|console|app)|\blistens? (on|at)\b`

// TestNothingWeb: banger has a command line and a Unix socket, and nothing for a browser.
// That the daemon listens on no TCP port is a test of test/daemon.
func TestNothingWeb(t *testing.T) {
	pattern := regexp.MustCompile(web)
	for text, found := range map[string]bool{
		"open http://localhost/": true, "https://box.lan:8443/vms": true, "it listens on port 80": true, "a Web UI": true,
		"in your browser": true, "see https://go.dev/doc/install": false, "banger start shop web": false, "the remotes' URLs": false,
	} {
		want(t, text, pattern.MatchString(text), found)
	}
	check := func(what, text string) {
		for _, found := range pattern.FindAllString(text, -1) {
			t.Errorf("%s says %q", what, found)
		}
	}
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	check("the README", string(readme))
	walk(tree(t), func(cmd *cobra.Command) {
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.InitDefaultHelpFlag()
		if err := cmd.Help(); err != nil {
			t.Fatal(err)
		}
		check(cmd.CommandPath()+" --help", out.String())
	})
	d := newFake(t)
	check("daemon status", d.run("daemon", "status").out)
}
