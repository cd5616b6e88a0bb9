package cli

import (
	"context"
	"path"

	"github.com/spf13/cobra"
)

func (a *app) execCommand() *cobra.Command {
	f := &execFlags{}
	cmd := &cobra.Command{
		Use:   "exec [FLAGS] VM CMD…",
		Short: "run a command in a running VM",
		Long: `Exec runs CMD in a running VM, in the home directory. As "exec -- CMD" in a repository
that has a VM it runs there, in the same subdirectory.

stdin, stdout and stderr stay apart and are passed on byte by byte. stdin is passed on
with -i, and when stdin and stdout are terminals: a loop that reads its own stdin can call exec.
Signals go to the command. A second Ctrl-C leaves; the command gets SIGHUP then.
http_proxy, https_proxy, ftp_proxy, all_proxy and no_proxy, also in capitals, are passed
on when the VM's network allows the proxy, one on the host's loopback by its name inside.
A password in them is known to the guest then.`,
		Example: `  banger exec shop uname -a
  banger exec -- git status
  gzip -c dump.sql | banger exec -i shop sh -c 'gunzip | psql'`,
		Annotations: guestsExits(),
	}
	f.add(cmd, "pass stdin on (default: when stdin and stdout are terminals)")
	cmd.Flags().SetInterspersed(false)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		inRepository := cmd.ArgsLenAtDash() == 0
		ref, argv := "", args
		if !inRepository {
			if len(args) == 0 {
				return usage(cmd, "VM is missing").WithHint("banger exec VM COMMAND, or in a repository banger exec -- COMMAND")
			}
			ref, argv = args[0], args[1:]
			if len(argv) > 0 && argv[0] == "--" {
				argv = argv[1:]
			}
		}
		if len(argv) == 0 {
			return usage(cmd, "a command is missing").WithHint("banger exec %s COMMAND", orElse(ref, "--"))
		}
		return a.exec(cmd, f, ref, argv)
	}
	return cmd
}

// exec runs argv in the VM ref, or in that of the repository here when ref is empty.
func (a *app) exec(cmd *cobra.Command, f *execFlags, ref string, argv []string) error {
	if _, err := a.command(cmd, f, "/", argv, false); err != nil {
		return err
	}
	c, err := a.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer c.close()
	target := command{vm: ref, name: ref}
	top, base := "", ""
	if ref == "" {
		found, err := a.repositoryVM(cmd.Context(), c)
		if err != nil {
			return err
		}
		target.vm, target.name = found.Vm.Id, found.Vm.Name
		if top = found.Vm.GetWorkspace().GetGuestPath(); top != "" {
			base = path.Join(top, found.Prefix)
		}
	}
	if target.exec, err = a.command(cmd, f, base, argv, false); err != nil {
		return err
	}
	if f.dir != "" {
		top = ""
	}
	if err := a.passProxies(cmd.Context(), c, &target, nil); err != nil {
		return err
	}
	code, err := a.inGuest(cmd.Context(), c, target, top)
	if err == nil && code != 0 {
		err = exit(code)
	}
	return err
}

// inGuest is runInGuest, also when the daemon is being replaced just now, and in the
// directory fallback, unless it is "", when the guest lacks the command's.
func (a *app) inGuest(ctx context.Context, c *client, cmd command, fallback string) (int, error) {
	code, err := a.runInGuest(ctx, c, cmd)
	if c.succeeded(ctx, err) {
		code, err = a.runInGuest(ctx, c, cmd)
	}
	if isNoDir(err) && fallback != "" && fallback != cmd.exec.Dir {
		a.ui.note("%s does not exist inside; running in %s", cmd.exec.Dir, fallback)
		cmd.exec.Dir = fallback
		code, err = a.runInGuest(ctx, c, cmd)
	}
	return code, err
}

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
