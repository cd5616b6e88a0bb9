package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"banger/internal/guest/wire"
)

// childName is argv[0] of the agent's own program when it is run once more, with
// the rights of a user.
const childName = "banger-agent-child"

// What a child does: its first argument. Trees have a treeJob as the second.
const (
	childNothing = "nothing"
	childUntar   = "untar"
	childTar     = "tar"
)

// childCommand runs this program once more. The link in /proc works in whatever root
// the agent is by now, but users need the right to execute the program.
func childCommand(args ...string) *exec.Cmd {
	return &exec.Cmd{Path: "/proc/self/exe", Args: append([]string{childName}, args...)}
}

// RunChild does not return when this process is a child of an agent. It must be the
// first that a main with an agent calls.
func RunChild() {
	if len(os.Args) < 2 || os.Args[0] != childName {
		return
	}
	if err := runChild(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runChild(args []string, in io.Reader, out io.Writer) error {
	if args[0] == childNothing {
		return nil
	}
	var job wire.Tree
	if len(args) != 2 {
		return errors.New("the child's arguments are wrong")
	}
	if err := json.Unmarshal([]byte(args[1]), &job); err != nil {
		return err
	}
	switch args[0] {
	case childUntar:
		return untar(in, job)
	case childTar:
		return tarTree(out, job)
	}
	return fmt.Errorf("the child does not know %q", args[0])
}

// tree runs untar or tar as the user whose rights are asked for.
func (a *Agent) tree(s *wire.Stream, req wire.Request) error {
	r := req.Tree
	if r == nil || !filepath.IsAbs(r.Dir) || strings.ContainsRune(r.Dir, 0) {
		return refusal(wire.ErrInvalid, "the tree's directory is not an absolute path")
	}
	for _, p := range r.Paths {
		if !filepath.IsLocal(p) {
			return refusal(wire.ErrInvalid, "%q is no path below the tree's directory", p)
		}
	}
	u, err := a.account(r.User)
	if err != nil {
		return err
	}
	if r.KeepOwners && u.uid != 0 {
		return refusal(wire.ErrInvalid, "only root can keep the owners of a tree")
	}
	job, err := json.Marshal(r)
	if err != nil {
		return err
	}
	self := childCommand(req.Op, string(job))
	return run(s, command{
		path: self.Path, argv: self.Args, env: []string{"HOME=" + u.home}, dir: "/",
		cred: u.credential(), stdin: req.Op == wire.OpUntar, acks: req.Acks, silent: true,
	})
}
