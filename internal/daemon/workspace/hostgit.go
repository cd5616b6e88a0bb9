package workspace

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

// hostGit runs git on the host, for reading only.
type hostGit struct {
	dir string
	env []string
}

// configEnv is git configuration as environment, see git-config(1), GIT_CONFIG_COUNT.
func configEnv(keyValues ...string) []string {
	env := []string{"GIT_CONFIG_COUNT=" + strconv.Itoa(len(keyValues)/2)}
	for i := 0; i+1 < len(keyValues); i += 2 {
		n := strconv.Itoa(i / 2)
		env = append(env, "GIT_CONFIG_KEY_"+n+"="+keyValues[i], "GIT_CONFIG_VALUE_"+n+"="+keyValues[i+1])
	}
	return env
}

// quietEnv keeps git from asking, writing what it need not, fetching what a partial
// clone lacks, and running programs that a repository names.
func quietEnv() []string {
	return append(configEnv("core.hooksPath", "/dev/null", "core.fsmonitor", "false", "core.quotePath", "false"),
		"GIT_OPTIONAL_LOCKS=0", "GIT_TERMINAL_PROMPT=0", "GIT_NO_LAZY_FETCH=1", "GIT_ALLOW_PROTOCOL=none",
		"GIT_NO_REPLACE_OBJECTS=1", "GIT_ADVICE=0", "LC_ALL=C")
}

// repositoryGit asks the repository that dir lies in, with the user's configuration.
func repositoryGit(dir string) hostGit {
	return hostGit{dir: dir, env: hostcmd.Env(quietEnv()...)}
}

func (g hostGit) run(ctx context.Context, in io.Reader, args ...string) ([]byte, error) {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: append([]string{"git"}, args...), Env: g.env, Dir: g.dir, Stdin: in})
	if errors.Is(err, exec.ErrNotFound) {
		return nil, api.Errorf(api.NotReady, "git is not installed on this machine").WithHint("%s", hostcmd.Install("git"))
	}
	return out, err
}

// line returns the output without its line end.
func (g hostGit) line(ctx context.Context, args ...string) (string, error) {
	out, err := g.run(ctx, nil, args...)
	return strings.TrimSuffix(string(out), "\n"), err
}

// ask is for questions that git answers by its exit status: 1 is no.
func (g hostGit) ask(ctx context.Context, args ...string) (string, bool, error) {
	out, err := g.line(ctx, args...)
	if exitCode(err) == 1 {
		return "", false, nil
	}
	return out, err == nil, err
}

func exitCode(err error) int {
	var failed *hostcmd.Error
	if errors.As(err, &failed) {
		return failed.ExitCode
	}
	return 0
}

// gitSays is what git wrote to standard error.
func gitSays(err error) string {
	var failed *hostcmd.Error
	if errors.As(err, &failed) {
		return failed.Stderr
	}
	return ""
}

// splitZ splits output of "-z".
func splitZ(out []byte) []string {
	s := strings.TrimSuffix(string(out), "\x00")
	if s == "" {
		return nil
	}
	return strings.Split(s, "\x00")
}

// visible makes a name from a repository fit for a terminal: what is not printable
// is escaped as in Go, the rest stays as it is.
func visible(name string) string {
	quoted := strconv.Quote(name)
	if inner := quoted[1 : len(quoted)-1]; inner != name {
		return quoted
	}
	return name
}

// isOID tells whether s is an object name in full, of SHA-1 or SHA-256.
func isOID(s string) bool {
	if len(s) != 40 && len(s) != 64 {
		return false
	}
	return strings.Trim(s, "0123456789abcdef") == ""
}

// list names up to three of names.
func list(names []string) string {
	shown := make([]string, 0, 3)
	for _, n := range names[:min(3, len(names))] {
		shown = append(shown, visible(n))
	}
	text := strings.Join(shown, ", ")
	if more := len(names) - len(shown); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
