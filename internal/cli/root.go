package cli

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The groups of the help.
const (
	groupRepository = "repository"
	groupVMs        = "vms"
	groupInside     = "inside"
	groupImages     = "images"
	groupMachine    = "machine"
)

// Exit codes as the help of a command lists them.
const (
	guestExitHelp = `  the command's own, 128+n when signal n ended it
  125  banger failed, or was called wrongly
  126  the command cannot be executed, 127 it was not found
  130  interrupted`
	exitHelp = `  0  done
  1  failed
  2  called wrongly
  3  not found
  4  the host is not ready
  5  busy, or refused
  130  interrupted`
)

// exitsKey is the annotation of a command that holds its exit codes for the help.
const exitsKey = "exits"

const helpTemplate = `{{with (or .Long .Short)}}{{. | trimTrailingWhitespaces}}

{{end}}{{.UsageString}}`

const usageTemplate = `Usage:
  {{.UseLine}}
{{if .HasAvailableSubCommands}}{{$root := .}}{{if .Groups}}{{range $group := .Groups}}
{{.Title}}{{range $root.Commands}}{{if (and (eq .GroupID $group.ID) .IsAvailableCommand)}}
  {{rpad .Name 8}} {{.Short}}{{end}}{{end}}
{{end}}{{else}}
Commands:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name 8}} {{.Short}}{{end}}{{end}}
{{end}}{{end}}
Examples:
{{.Example}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{if .HasAvailableInheritedFlags}}

Global flags:
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}

Exit codes:
{{index .Annotations "exits"}}{{if .HasAvailableSubCommands}}

"{{.CommandPath}} COMMAND --help" says more.{{end}}
`

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "banger COMMAND",
		Short: "Linux microVMs for repositories",
		Long: `banger gives a repository a Linux VM of its own: it boots in seconds, keeps its
disk, holds the repository at the same path, and gives the changes back as a patch.

A VM is named by its name, its id, or a prefix of either that fits only one.`,
		Example: `  cd ~/shop && banger up -- make test
  banger diff
  banger apply`,
		Annotations:   map[string]string{exitsKey: exitHelp},
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpTemplate(helpTemplate)
	root.SetUsageTemplate(usageTemplate)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var value *pflag.InvalidValueError
		if errors.As(err, &value) {
			err := usage(cmd, "--%s: %s", value.GetFlag().Name, errors.Unwrap(value))
			if _, rule := value.GetFlag().Value.(*rulesValue); rule {
				err = err.WithHint("banger set --help") // it has their grammar
			}
			return err
		}
		return usage(cmd, "%s", err)
	})
	root.AddGroup(
		&cobra.Group{ID: groupRepository, Title: "The repository:"},
		&cobra.Group{ID: groupVMs, Title: "VMs:"},
		&cobra.Group{ID: groupInside, Title: "Inside:"},
		&cobra.Group{ID: groupImages, Title: "Images:"},
		&cobra.Group{ID: groupMachine, Title: "Machine:"},
	)
	a.addGlobalFlags(root)
	grouped := func(id string, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = id
			root.AddCommand(cmd)
		}
	}
	grouped(groupRepository, a.upCommand(), a.diffCommand(), a.applyCommand())
	grouped(groupVMs, a.runCommand(), a.createCommand(), a.psCommand(), a.startCommand(), a.stopCommand(), a.rmCommand(), a.showCommand(), a.setCommand())
	grouped(groupInside, a.execCommand(), a.logsCommand(), a.portCommand(), a.forwardCommand())
	grouped(groupImages, a.imageCommand(), a.kernelCommand())
	grouped(groupMachine, a.doctorCommand(), a.setupCommand(), a.daemonCommand(), a.opCommand(), a.versionCommand())

	vm := a.parent("vm", "the commands on VMs, under one name",
		a.runCommand(), a.createCommand(), a.psCommand(), a.startCommand(), a.stopCommand(), a.rmCommand(), a.showCommand(), a.setCommand(),
		a.execCommand(), a.logsCommand(), a.portCommand(), a.forwardCommand())
	workspace := a.parent("workspace", "a repository in a VM, step by step", a.prepareCommand(), a.exportCommand())
	vm.Hidden, workspace.Hidden = true, true
	root.AddCommand(vm, workspace)
	makeParent(root)
	a.addVersionFlag(root)
	help := helpCommand()
	help.GroupID = groupMachine
	root.SetHelpCommand(help)
	tidy(root)
	return root
}

// tidy keeps "[flags]" out of the usage lines.
func tidy(cmd *cobra.Command) {
	cmd.DisableFlagsInUseLine = true
	for _, child := range cmd.Commands() {
		tidy(child)
	}
}

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "help [COMMAND]",
		Short:       "what a command does",
		Long:        "Help prints the help of a command, as --help after it does.",
		Example:     "  banger help up\n  banger help image pull",
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usage(cmd, "there is no command %q", strings.Join(args, " ")).WithHint("banger --help")
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}

func (a *app) addGlobalFlags(root *cobra.Command) {
	fs := root.PersistentFlags()
	fs.Var(&formatValue{&a.json}, "format", "how data, and an error, is printed")
	fs.BoolVarP(&a.ui.quiet, "quiet", "q", false, "no progress and no notes; lists print names only")
	fs.BoolVar(&a.noColor, "no-color", false, "no colours")
}

// parent makes a command that only holds others.
func (a *app) parent(name, short string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: name + " COMMAND", Short: short, Long: strings.ToUpper(short[:1]) + short[1:] + ".",
		Example:     "  " + "banger " + name + " " + children[0].Name(),
		Annotations: map[string]string{exitsKey: exitHelp},
	}
	cmd.AddCommand(children...)
	makeParent(cmd)
	return cmd
}

// makeParent lets a command print its help, and refuse what is none of its children.
func makeParent(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		err := usage(cmd, "%s has no command %q", cmd.CommandPath(), args[0])
		if near := meant(cmd, args[0]); near != "" {
			err = err.WithHint("%s %s", cmd.CommandPath(), near)
		}
		return err
	}
}

// meant guesses the child of cmd that was meant by a name that none has, or "". In short
// words the letters that do not differ say nothing: "cp" is not meant to be "op".
func meant(cmd *cobra.Command, name string) string {
	for _, g := range []struct{ distance, letters int }{{1, 3}, {2, 4}} {
		cmd.SuggestionsMinimumDistance = g.distance
		for _, near := range cmd.SuggestionsFor(name) {
			if min(len(name), len(near)) >= g.letters {
				return near
			}
		}
	}
	return ""
}

// exits is the annotation of a command of which 0 to 5 and 130 are the exit codes.
func exits() map[string]string { return map[string]string{exitsKey: exitHelp} }

// guestsExits is that of a command that passes the guest's exit code on.
func guestsExits() map[string]string {
	return map[string]string{exitsKey: guestExitHelp, guestExits: "yes"}
}

// arguments makes a check of the number of arguments.
func arguments(min, max int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < min:
			return usage(cmd, "%s is missing", what)
		case max >= 0 && len(args) > max:
			return usage(cmd, "%q is one argument too many", args[max])
		}
		return nil
	}
}
