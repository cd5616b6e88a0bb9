package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"

	"banger/api"
	"banger/internal/daemon/hostcmd"
)

// quietEnv keeps git from asking, fetching, and running what a repository names. It is
// stricter than what workspace gives git: there git reads the user's own files.
func quietEnv(extra ...string) []string {
	keys := []string{"core.hooksPath", "/dev/null", "core.fsmonitor", "false", "core.quotePath", "false",
		"core.protectHFS", "true", "core.protectNTFS", "true", "gc.auto", "0"}
	env := []string{"GIT_CONFIG_COUNT=" + strconv.Itoa(len(keys)/2), "GIT_OPTIONAL_LOCKS=0", "GIT_TERMINAL_PROMPT=0",
		"GIT_NO_LAZY_FETCH=1", "GIT_ALLOW_PROTOCOL=none", "GIT_NO_REPLACE_OBJECTS=1", "LC_ALL=C"}
	for i := 0; i < len(keys); i += 2 {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i/2, keys[i]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i/2, keys[i+1]))
	}
	return hostcmd.Env(append(env, extra...)...)
}

// git returns what git printed, without the last line's end.
func git(ctx context.Context, dir string, env []string, in io.Reader, args ...string) (string, error) {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: append([]string{"git"}, args...), Env: env, Dir: dir, Stdin: in})
	if errors.Is(err, exec.ErrNotFound) {
		return "", api.Errorf(api.NotReady, "git is not installed on this machine").WithHint("%s", hostcmd.Install("git"))
	}
	return strings.TrimSuffix(string(out), "\n"), err
}

// answered tells that git itself said no: it ran to its end.
func answered(err error) bool {
	var failed *hostcmd.Error
	return errors.As(err, &failed) && failed.ExitCode > 0
}

// gitSays is what git wrote to standard error.
func gitSays(err error) string {
	var failed *hostcmd.Error
	if errors.As(err, &failed) {
		return failed.Stderr
	}
	return ""
}

// shown makes a name of a file fit for a line of text: one that holds what is not
// printable is quoted as in Go.
func shown(name string) string {
	quoted := strconv.Quote(name)
	if inner := quoted[1 : len(quoted)-1]; inner != name {
		return quoted
	}
	return name
}

// list names up to three of names.
func list(names []string) string {
	var text []string
	for _, name := range names[:min(3, len(names))] {
		text = append(text, shown(name))
	}
	all := strings.Join(text, ", ")
	if more := len(names) - len(text); more > 0 {
		all += fmt.Sprintf(" and %d more", more)
	}
	return all
}
