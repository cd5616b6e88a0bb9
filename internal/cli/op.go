package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func (a *app) opCommand() *cobra.Command {
	return a.parent("op", "jobs in the daemon: list, wait for, cancel", a.opLsCommand(), a.opWaitCommand(), a.opCancelCommand())
}

func (a *app) opLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "jobs that run or ended a short time ago",
		Long: `Op ls lists the daemon's jobs, the newest first: those that run, and those that ended a
short time ago. They go on when the banger that began them is gone. -q prints the ids
only.`,
		Example:     "  banger op ls",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			res, err := c.operations.List(cmd.Context(), &bangerv1.ListOperationsRequest{})
			if err != nil {
				return err
			}
			return a.printOperations(res.Operations)
		},
	}
}

func (a *app) printOperations(ops []*bangerv1.Operation) error {
	if a.json {
		return printJSONList(a, ops)
	}
	if a.ui.quiet {
		for _, op := range ops {
			if _, err := fmt.Fprintln(a.stdout, op.Id); err != nil {
				return err
			}
		}
		return nil
	}
	t := &table{}
	t.row("ID", "KIND", "TARGET", "STATE", "STEP", "BEGAN")
	for _, op := range ops {
		step := "-"
		state := strings.ToLower(op.State.String())
		if op.State == bangerv1.Operation_RUNNING {
			if op.StepName != "" {
				step = fmt.Sprintf("%d/%d %s%s", op.Step, op.Steps, op.StepName, bytesOf(op))
			}
			if op.Cancelling {
				state = "cancelling"
			}
		}
		t.row(op.Id, op.Kind, orElse(op.Target, "-"), state, step, a.ago(op.CreatedAt))
	}
	return a.printTable(t)
}

func (a *app) opWaitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "wait ID",
		Short: "wait until a job has ended",
		Long: `Op wait shows the progress of a job and ends when it has: 0 when it was done, else with
the exit code of its error. Ctrl-C stops the waiting, not the job.`,
		Example:     "  banger op wait $(banger op ls -q | head -n 1)",
		Args:        arguments(1, 1, "ID"),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			op, err := findOperation(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			op, err = a.watch(c, op, watch{ctx: cmd.Context()})
			if err == nil && a.json {
				return a.printJSON(op)
			}
			return err
		},
	}
}

func (a *app) opCancelCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "undo a job that runs",
		Long: `Op cancel asks a job to undo what it did and waits until it has. A job that has ended
already stays as it is.`,
		Example:     "  banger op cancel 6thnexlk",
		Args:        arguments(1, 1, "ID"),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			op, err := findOperation(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			if op.State != bangerv1.Operation_RUNNING {
				a.ui.note("%s %s has ended already: %s", op.Kind, op.Target, strings.ToLower(op.State.String()))
				return nil
			}
			if _, err := c.operations.Cancel(cmd.Context(), &bangerv1.CancelOperationRequest{Id: op.Id}); err != nil {
				return err
			}
			op, err = a.watch(c, op, watch{ctx: cmd.Context()})
			if op.GetState() == bangerv1.Operation_CANCELLED {
				return nil
			}
			if err == nil {
				a.ui.note("%s %s was done before it could be cancelled", op.Kind, op.Target)
			}
			return err
		},
	}
}

// findOperation asks for one operation; the first message of its watch is how it is
// now.
func findOperation(ctx context.Context, c *client, id string) (*bangerv1.Operation, error) {
	stream, err := c.operations.Watch(ctx, &bangerv1.WatchOperationRequest{Id: id})
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, errNoDaemon
	}
	return stream.Msg(), nil
}
