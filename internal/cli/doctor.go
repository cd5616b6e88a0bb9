package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

// doctorFunc runs the host checks in this process.
type doctorFunc func(ctx context.Context, l config.Layout) []*bangerv1.Check

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "check what this machine has and lacks",
		Long: `Doctor checks whether this machine has what banger needs, and says for each thing it
lacks what would mend it. It needs no daemon and changes nothing. The exit code is 4
when a check failed.`,
		Example:     "  banger doctor\n  banger doctor --format json",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := a.layout()
			if err != nil {
				return err
			}
			checks := a.doctor(cmd.Context(), l)
			if err := a.printChecks(checks); err != nil {
				return err
			}
			for _, c := range checks {
				if c.Result == bangerv1.Check_FAIL {
					return exit(exitNotReady)
				}
			}
			return nil
		},
	}
}

func (a *app) printChecks(checks []*bangerv1.Check) error {
	if a.json {
		return printJSONList(a, checks)
	}
	t := &table{}
	for _, c := range checks {
		if a.ui.quiet && c.Result == bangerv1.Check_OK {
			continue
		}
		t.row(strings.ToLower(c.Result.String()), c.Name, orElse(c.Finding, c.Purpose))
		if c.Result != bangerv1.Check_OK && c.Purpose != "" && c.Finding != "" {
			t.row("", "", "needed for: "+c.Purpose)
		}
		if c.Fix != "" {
			t.row("", "", fmt.Sprintf("mend it with: %s", c.Fix))
		}
	}
	return t.write(a.stdout)
}
