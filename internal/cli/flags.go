package cli

import (
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/guest/wire"
)

// sizeValue is a flag like "4G"; zero means that it was left out.
type sizeValue int64

func (v *sizeValue) Type() string { return "SIZE" }

func (v *sizeValue) String() string {
	if *v == 0 {
		return ""
	}
	return config.FormatSize(int64(*v))
}

func (v *sizeValue) Set(s string) error {
	n, err := config.ParseSize(s)
	if err == nil && n == 0 {
		err = fmt.Errorf("it must be more than nothing")
	}
	*v = sizeValue(n)
	return err
}

// timeValue is a flag like "30s".
type timeValue time.Duration

func (v *timeValue) Type() string   { return "TIME" }
func (v *timeValue) String() string { return strings.TrimSuffix(time.Duration(*v).String(), "m0s") }

func (v *timeValue) Set(s string) error {
	d, err := config.ParseDuration(s)
	*v = timeValue(d)
	return err
}

// cpusValue is a number of CPUs; zero means that it was left out.
type cpusValue int32

func (v *cpusValue) Type() string { return "N" }

func (v *cpusValue) String() string {
	if *v == 0 {
		return ""
	}
	return fmt.Sprint(int32(*v))
}

func (v *cpusValue) Set(s string) error {
	var n int
	if _, err := fmt.Sscanf(s, "%d", &n); err != nil || fmt.Sprint(n) != s {
		return fmt.Errorf("%q is no number", s)
	}
	if err := config.ValidateCPUs(n); err != nil {
		return err
	}
	*v = cpusValue(n)
	return nil
}

// nameValue is the name of a new VM.
type nameValue string

func (v *nameValue) Type() string   { return "NAME" }
func (v *nameValue) String() string { return string(*v) }

func (v *nameValue) Set(s string) error {
	*v = nameValue(s)
	return config.ValidateName(s)
}

// readyValue is how far a VM must be.
type readyValue bangerv1.Ready

func (v *readyValue) Type() string { return "agent|system" }

func (v *readyValue) String() string {
	if *v == readyValue(bangerv1.Ready_READY_AGENT) {
		return "agent"
	}
	return "system"
}

func (v *readyValue) Set(s string) error {
	switch s {
	case "agent":
		*v = readyValue(bangerv1.Ready_READY_AGENT)
	case "system":
		*v = readyValue(bangerv1.Ready_READY_SYSTEM)
	default:
		return fmt.Errorf("it is agent or system")
	}
	return nil
}

// formatValue is --format. It is set while arguments are parsed, so that an error of
// the arguments after it has the format too.
type formatValue struct{ json *bool }

func (v *formatValue) Type() string { return "table|json" }

func (v *formatValue) String() string {
	if v.json != nil && *v.json {
		return "json"
	}
	return "table"
}

func (v *formatValue) Set(s string) error {
	if s != "table" && s != "json" {
		return fmt.Errorf("it is table or json")
	}
	*v.json = s == "json"
	return nil
}

// vmFlags describe a new VM.
type vmFlags struct {
	name   nameValue
	image  string
	cpus   cpusValue
	memory sizeValue
	disk   sizeValue
	ready  readyValue

	network networkFlags
}

func (f *vmFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.Var(&f.name, "name", "name of the VM (default: made up, in a repository that of its folder)")
	fs.StringVar(&f.image, "image", "", "`IMAGE` that the VM is made from (default: the configured one, debian-bookworm)")
	fs.Var(&f.cpus, "cpus", "number of CPUs (default: the host's, at most 4)")
	fs.Var(&f.memory, "memory", "memory, for example 512M; taken from the host as the guest touches it (default: a quarter of the host's, at most 4G)")
	fs.Var(&f.disk, "disk", "size of the disk, for example 20G; taken as it fills (default: 20G)")
	f.network.add(cmd, "what the VM may reach when no rule says otherwise (default: the configured one, internet)")
	fs.Var(&f.ready, "ready", "how far the VM must be: the agent answers, or the system has started")
}

// request is what Create is asked for.
func (f *vmFlags) request() *bangerv1.CreateVMRequest {
	return &bangerv1.CreateVMRequest{
		Name: string(f.name), Image: f.image, Cpus: int32(f.cpus), Memory: int64(f.memory), Disk: int64(f.disk),
		Ready: bangerv1.Ready(f.ready), Network: f.network.message(),
	}
}

// given names the flags that only a new VM can obey.
func (f *vmFlags) given(cmd *cobra.Command) []string {
	var names []string
	for _, name := range []string{"name", "image", "cpus", "memory", "disk"} {
		if cmd.Flags().Changed(name) {
			names = append(names, "--"+name)
		}
	}
	return names
}

// execFlags say how a command runs.
type execFlags struct {
	interactive bool
	tty         bool
	env         []string
	user        string
	dir         string
}

func (f *execFlags) add(cmd *cobra.Command, stdin string) {
	fs := cmd.Flags()
	fs.BoolVarP(&f.interactive, "interactive", "i", false, stdin)
	fs.BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal, as its stdin too if stdin is one (default: when stdin and stdout are terminals)")
	fs.StringArrayVarP(&f.env, "env", "e", nil, "environment variable `KEY=VALUE`; KEY alone takes the value from here")
	fs.StringVarP(&f.user, "user", "u", "", "`USER` in the guest: name, uid or uid:gid (default: you, as the image knows you)")
	fs.StringVarP(&f.dir, "workdir", "w", "", "`DIR` in the guest, relative to where the command would run")
}

// command makes what the guest is asked to run. base is the directory in the guest
// where the command would run, "" for the home directory. A piped or redirected stdin
// goes in by itself when pipes is set.
func (a *app) command(cmd *cobra.Command, f *execFlags, base string, argv []string, pipes bool) (wire.Exec, error) {
	e := wire.Exec{Argv: argv, User: f.user, Dir: base, TTY: f.tty}
	if !cmd.Flags().Changed("tty") {
		e.TTY = a.onTerminal()
	}
	e.Stdin = f.interactive || e.TTY && isTerminal(a.stdin) || pipes && !isTerminal(a.stdin)
	if cmd.Flags().Changed("interactive") && !f.interactive || e.TTY && !f.interactive && isNull(a.stdin) {
		e.Stdin = false
	}
	switch {
	case e.TTY && e.Stdin && !isTerminal(a.stdin):
		// A terminal takes some bytes for keys and cuts long lines.
		return e, usage(cmd, "-t: stdin is no terminal, and cannot be passed on through one").WithHint("%s -i, without -t", cmd.CommandPath())
	case path.IsAbs(f.dir):
		e.Dir = path.Clean(f.dir)
	case f.dir != "" && base == "":
		return e, usage(cmd, "-w %s: a relative directory needs a repository: name it from / on", f.dir)
	case f.dir != "":
		e.Dir = path.Join(base, f.dir)
	}
	if e.TTY {
		for _, key := range []string{"TERM", "COLORTERM"} {
			if value := a.env.get(key); value != "" {
				e.Env = append(e.Env, key+"="+value)
			}
		}
	}
	for _, kv := range f.env {
		key, _, assigned := strings.Cut(kv, "=")
		if key == "" || strings.ContainsRune(kv, 0) {
			return e, usage(cmd, "-e %q: write KEY=VALUE or KEY", kv)
		}
		if value, ok := a.env.lookup(kv); !assigned && ok {
			e.Env = append(e.Env, key+"="+value)
		} else if assigned {
			e.Env = append(e.Env, kv)
		}
	}
	return e, nil
}

// splitDash parts the arguments before "--" from those after it. cut is false without
// a "--".
func splitDash(cmd *cobra.Command, args []string) (before, after []string, cut bool) {
	if n := cmd.ArgsLenAtDash(); n >= 0 {
		return args[:n], args[n:], true
	}
	return args, nil, false
}

// isPath tells an argument that is a path from a name: it begins with ".", "/" or "~".
func isPath(arg string) bool {
	return strings.HasPrefix(arg, ".") || strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, "~")
}
