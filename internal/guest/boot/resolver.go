package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// resolverMark begins the file, for who reads it.
const resolverMark = "# written by banger at each boot\n"

// setResolver tells the image's programs whom to ask for names.
func (g *guest) setResolver() error {
	if g.cfg.Network == nil || len(g.cfg.Network.DNS) == 0 {
		return nil
	}
	return writeResolver("/", g.cfg.Network.DNS)
}

// writeResolver makes etc/resolv.conf below root say what the resolvers are, at each
// boot, by one rule:
//
//  1. A file is replaced: that of an image names the resolver of where it was built. One
//     that must stay can be made immutable; the boot then only complains.
//  2. A link that leads below /run stays, and the file is made where it leads: nobody has
//     made it yet at this time of the boot.
//  3. If that is systemd-resolved's directory, resolved is told too, in
//     /run/systemd/resolved.conf.d. It then writes the file anew, to itself, when it
//     starts; an image whose resolved is off keeps ours.
//  4. Any other link is replaced by a file, and what it led to is left alone.
func writeResolver(root string, servers []string) error {
	content := resolverMark
	for _, server := range servers {
		content += "nameserver " + server + "\n"
	}
	path := filepath.Join(root, "etc/resolv.conf")
	target, isLink, err := linkBelowRun(path, root)
	if err != nil {
		return fmt.Errorf("cannot write /etc/resolv.conf: %w", err)
	}
	switch {
	case target != "":
		path = filepath.Join(root, target)
	case isLink:
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("cannot write /etc/resolv.conf: %w", err)
		}
	}
	err = replaceFile(path, content, 0o644)
	if err == nil && strings.HasPrefix(target, "/run/systemd/resolve/") {
		err = replaceFile(filepath.Join(root, "run/systemd/resolved.conf.d/banger.conf"),
			resolverMark+"[Resolve]\nDNS="+strings.Join(servers, " ")+"\nDomains=~.\n", 0o644)
	}
	if err != nil {
		return fmt.Errorf("cannot write /etc/resolv.conf: %w", err)
	}
	return nil
}

// linkBelowRun says whether path, a file of /etc, is a link, and where it leads if that
// is below /run, by the words of the link alone.
func linkBelowRun(path, root string) (target string, isLink bool, err error) {
	target, err = os.Readlink(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", false, nil
	case err != nil:
		// EINVAL: it is no link.
		if _, statErr := os.Lstat(path); statErr == nil {
			err = nil
		}
		return "", false, err
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join("/etc", target)
	}
	target = strings.TrimPrefix(filepath.Clean(target), "/var")
	if !strings.HasPrefix(target, "/run/") {
		return "", true, nil
	}
	return target, true, nil
}
