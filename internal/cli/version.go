package cli

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "version",
		Short:       "the version of this banger",
		Long:        `Version prints the version of banger itself; banger daemon status tells that of bangerd.`,
		Example:     "  banger version\n  banger version --format json",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE:        func(*cobra.Command, []string) error { return a.printVersion() },
	}
}

// addVersionFlag is for those who look for the version where most programs have it.
func (a *app) addVersionFlag(root *cobra.Command) {
	version := root.Flags().Bool("version", false, "what banger version prints")
	run := root.RunE
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if *version && len(args) == 0 {
			return a.printVersion()
		}
		return run(cmd, args)
	}
}

func (a *app) printVersion() error {
	version, commit := buildVersion()
	platform := runtime.GOOS + "/" + runtime.GOARCH
	if a.json {
		b, err := json.Marshal(map[string]string{
			"version": version, "commit": commit, "go": runtime.Version(), "platform": platform})
		if err != nil {
			return err
		}
		return a.printIndented(b)
	}
	line := "banger " + version
	if commit != "" {
		line += " (" + commit + ")"
	}
	_, err := fmt.Fprintln(a.stdout, line, runtime.Version(), platform)
	return err
}

// release is the version of banger and bangerd.
const release = "0.1.0-dev"

// buildVersion is the release, and the commit that this program was built from if the Go
// tool knows it: shortened, with a "+" when the tree was dirty.
func buildVersion() (version, commit string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return release, ""
	}
	dirty := ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value[:min(len(s.Value), 12)]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+"
		}
	}
	if commit != "" {
		commit += dirty
	}
	return release, commit
}
