package workspace

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"banger/api"
)

// places are where repositories go inside.
type places struct {
	// fallback is the folder for those that cannot be at their path on the host.
	fallback string
	// volatile do not last in a guest, or are not the guest's own: systemd empties /tmp
	// at boot.
	volatile []string
}

func guestPlaces() places {
	return places{fallback: "/workspace", volatile: []string{"/tmp", "/var/tmp", "/run", "/dev", "/proc", "/sys"}}
}

const maxPlaces = 20

// place finds or makes the folder of the repository: its path on the host where
// that can be had, else below the fallback, and then note says why. Parents are made as
// root; the folder belongs to the guest's user.
func (p places) find(ctx context.Context, g guest, r Repo) (dir, note string, err error) {
	h, err := g.hello(ctx)
	if err != nil {
		return "", "", err
	}
	why := ""
	for i := range maxPlaces {
		dir := p.candidate(r, i)
		if i == 0 {
			if top := p.volatileTop(dir); top != "" {
				why = top + " does not last inside"
				continue
			}
		}
		problem, err := claim(ctx, g, dir, h.User)
		if err != nil {
			return "", "", err
		}
		if problem == "" {
			if i > 0 {
				note = fmt.Sprintf("the repository is at %s inside: %s", visible(dir), why)
			}
			return dir, note, nil
		}
		if i == 0 {
			why = problem
		}
	}
	return "", "", api.Errorf(api.Refused, "there is no free place for it in the guest: %s", why).
		WithHint("banger exec %s ls %s", g.name, p.fallback)
}

func (p places) candidate(r Repo, i int) string {
	name := r.Name
	if strings.Trim(name, "/.") == "" {
		name = "repository"
	}
	switch i {
	case 0:
		return r.Path
	case 1:
		return path.Join(p.fallback, name)
	}
	return path.Join(p.fallback, name) + "-" + strconv.Itoa(i)
}

func (p places) volatileTop(dir string) string {
	for _, top := range p.volatile {
		if dir == top || strings.HasPrefix(dir, top+"/") {
			return top
		}
	}
	return ""
}

// claim makes dir a folder of the user, or says why it cannot be one.
func claim(ctx context.Context, g guest, dir, user string) (problem string, err error) {
	const root = "root"
	content, _, err := g.ask(ctx, command{argv: []string{"ls", "-A", "--", dir}, user: root})
	exists := err == nil
	var failed *guestError
	if err != nil && !errors.As(err, &failed) {
		return "", err
	}
	if exists && content != "" {
		_, ours, err := g.ask(ctx, command{argv: []string{"test", "-d", path.Join(dir, ".git/banger")}, user: root})
		if err != nil || ours {
			return "", err
		}
		// .git comes before .git/banger: an empty one is a prepare's that got no further.
		begun := content == ".git"
		if begun {
			if _, begun, err = g.ask(ctx, command{argv: []string{"rmdir", "--", path.Join(dir, ".git")}, user: root}); err != nil {
				return "", err
			}
		}
		if !begun {
			return "there are files at " + visible(dir) + " already", nil
		}
	}
	_, err = g.run(ctx, command{argv: []string{"mkdir", "-p", "--", dir}, user: root})
	if errors.As(err, &failed) && api.CodeOf(err) != api.NoSpace {
		return visible(dir) + " cannot be made", nil
	}
	if err != nil {
		return "", err
	}
	if user != "" && user != root {
		if _, err := g.run(ctx, command{argv: []string{"chown", "--", user + ":", dir}, user: root}); err != nil {
			return "", err
		}
	}
	_, writable, err := g.ask(ctx, command{argv: []string{"test", "-w", dir, "-a", "-x", dir}, dir: "/"})
	if err != nil || writable {
		return "", err
	}
	if _, err := g.run(ctx, command{argv: []string{"rmdir", "--", dir}, user: root}); err != nil && !errors.As(err, &failed) {
		return "", err
	}
	return fmt.Sprintf("%s may not be written by %s", visible(dir), visible(user)), nil
}
