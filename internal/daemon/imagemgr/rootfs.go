package imagemgr

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/opstate"
)

// The space that building an image takes at its peak, in bytes.
const (
	imageRoom   = 1 << 30   // tar, tree and file system in the cache
	scratchRoom = 512 << 20 // mmdebstrap's own tree, where that is elsewhere
)

// The steps of BuildImage, in their order. The first ones are mmdebstrap's; the
// lines by which it tells them are in phases.
const (
	stepLists = iota + 1
	stepDownload
	stepExtract
	stepEssential
	stepInstall
	stepPack
	stepFileSystem
	stepCheck
	imageSteps = stepCheck
)

// BuildImage makes RootfsFile in dir, an empty directory of the caller's, and
// leaves nothing else there. After an error dir is to be given to Remove. Errors
// that a caller acts on: syscall.ENOSPC, *MissingError, *NamespaceError,
// ErrNetwork, ErrSignature.
func (b *Builder) BuildImage(ctx context.Context, r ImageRecipe, dir string, p opstate.Progress) (ImageInfo, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, buildTimeout, fmt.Errorf("it took longer than %s", buildTimeout))
	defer cancel()
	info, err := b.buildImage(ctx, r, dir, p)
	if err != nil {
		if ctx.Err() != nil {
			return info, context.Cause(ctx)
		}
		return info, explain(err)
	}
	return info, nil
}

func (b *Builder) buildImage(ctx context.Context, r ImageRecipe, dir string, p opstate.Progress) (ImageInfo, error) {
	p.Step(stepLists, imageSteps, "fetch package lists")
	a, err := b.prepare(ctx, true)
	if err != nil {
		return ImageInfo{}, err
	}
	if err := roomFor(dir, imageRoom); err != nil {
		return ImageInfo{}, err
	}
	packed := filepath.Join(dir, "packages.tar")
	if err := b.bootstrap(ctx, r, a, dir, packed, p); err != nil {
		return ImageInfo{}, err
	}
	p.Step(stepFileSystem, imageSteps, "make file system")
	found, err := inspectTar(packed)
	if err != nil {
		return ImageInfo{}, err
	}
	info := ImageInfo{Size: rootSize(found.content), Packages: found.packages}
	image := filepath.Join(dir, RootfsFile)
	if err := b.assemble(ctx, r, dir, packed, fsSpec{image: image, label: "banger-root", size: info.Size, grows: true}); err != nil {
		return ImageInfo{}, err
	}
	p.Step(stepCheck, imageSteps, "check file system")
	if err := checkExt4(ctx, image); err != nil {
		return ImageInfo{}, err
	}
	return info, syncTree(dir)
}

// bootstrap makes a tar of the packages.
func (b *Builder) bootstrap(ctx context.Context, r ImageRecipe, a archive, dir, packed string, p opstate.Progress) error {
	scratch, err := b.scratch(dir)
	if err != nil {
		return err
	}
	err = watchSize(p, 0, func() error {
		_, err := hostcmd.Run(ctx, hostcmd.Command{
			Argv:   mmdebstrapArgs(r, a, b.root, packed),
			Env:    network("TMPDIR=" + scratch),
			Stderr: &phases{progress: p},
		})
		return err
	}, packed)
	if err != nil {
		return err
	}
	// The note goes with the directory that it names.
	if err := b.removeTree(ctx, scratch); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, scratchNote)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// mmdebstrapArgs is the command that makes a tar of r's packages.
func mmdebstrapArgs(r ImageRecipe, a archive, root bool, target string) []string {
	// As root it mounts /proc, /sys and the host's /dev/shm in its tree, in whatever
	// mount namespace it runs in, and leaves them there when it is killed. In one of
	// its own they go with it, and nobody who removes the tree can get into them.
	argv := []string{"mmdebstrap", "--mode=unshare"}
	if root {
		argv = []string{"unshare", "--mount", "--propagation=private", "mmdebstrap", "--mode=root"}
	}
	argv = append(argv, "--variant=minbase", "--format=tar", "--architectures="+arch,
		"--include="+strings.Join(r.Packages, ","))
	for _, option := range a.options {
		argv = append(argv, "--aptopt="+option)
	}
	// A build that a power loss breaks off is thrown away: nothing needs to be synced.
	argv = append(argv, "--dpkgopt=force-unsafe-io")
	for _, option := range r.Dpkg {
		argv = append(argv, "--dpkgopt="+option)
	}
	argv = append(argv, r.Suite, target)
	return append(argv, a.sources(r.Suite)...)
}

// phases turns mmdebstrap's messages into steps. A line that a version does not
// print costs its step and nothing else.
type phases struct {
	progress opstate.Progress
	line     []byte
}

func (w *phases) Write(data []byte) (int, error) {
	for _, c := range data {
		if c != '\n' && c != '\r' {
			if len(w.line) < 1024 {
				w.line = append(w.line, c)
			}
			continue
		}
		if step, name := phase(string(w.line)); step > 0 {
			w.progress.Step(step, imageSteps, name)
		}
		w.line = w.line[:0]
	}
	return len(data), nil
}

func phase(line string) (step int, name string) {
	for _, f := range []struct {
		prefix string
		step   int
		name   string
	}{
		{"I: downloading packages", stepDownload, "download packages"},
		{"I: extracting archives", stepExtract, "unpack base system"},
		{"I: installing essential packages", stepEssential, "install base system"},
		{"I: installing remaining packages", stepInstall, "install packages"},
		{"I: creating tarball", stepPack, "pack"},
	} {
		if strings.HasPrefix(line, f.prefix) {
			return f.step, f.name
		}
	}
	return 0, ""
}

// assemble unpacks the tar with banger's files over it, and makes the file system.
func (b *Builder) assemble(ctx context.Context, r ImageRecipe, dir, packed string, fs fsSpec) error {
	own := filepath.Join(dir, "files.tar")
	if err := createFile(own, func(w io.Writer) error { return writeOverlay(w, r.Files, time.Now()) }); err != nil {
		return err
	}
	fs.tree = filepath.Join(dir, "tree")
	if err := os.Mkdir(fs.tree, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(fs.tree, 0o755); err != nil {
		return err
	}
	for _, untar := range [][]string{untarArgs(packed, fs.tree, r.Exclude), untarArgs(own, fs.tree, nil)} {
		if _, err := hostcmd.Run(ctx, hostcmd.Command{Argv: b.asRoot(untar...)}); err != nil {
			return err
		}
	}
	for _, file := range []string{packed, own} {
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	if err := makeExt4(ctx, fs, b.asRoot); err != nil {
		return err
	}
	return b.removeTree(ctx, fs.tree)
}

func untarArgs(file, tree string, exclude []string) []string {
	argv := []string{
		"tar", "--extract", "--file=" + file, "--directory=" + tree, "--numeric-owner", "--same-owner",
		"--preserve-permissions", "--xattrs", "--xattrs-include=*", "--anchored",
	}
	for _, pattern := range exclude {
		argv = append(argv, "--exclude="+pattern)
	}
	return argv
}

// found is what inspectTar saw.
type found struct {
	content
	packages []string
}

// inspectTar reads a tar of a root file system: how much is in it, which packages,
// and whether it is what it should be.
func inspectTar(file string) (found, error) {
	f, err := os.Open(file)
	if err != nil {
		return found{}, err
	}
	defer f.Close()
	res, err := inspectTree(f)
	if err != nil {
		return found{}, fmt.Errorf("cannot use what mmdebstrap made: %w", err)
	}
	return res, nil
}

func inspectTree(r io.Reader) (found, error) {
	var res found
	missing := map[string]bool{"usr/bin/sudo": true, "usr/sbin/init": true, "etc/passwd": true}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return found{}, err
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "./"))
		size := h.Size
		if h.Typeflag == tar.TypeDir {
			size = blockSize
		}
		if h.Typeflag != tar.TypeLink { // a hard link has neither inode nor data
			res.add(size)
		}
		delete(missing, name)
		switch name {
		case "usr/bin/sudo":
			if h.Uid != 0 || h.Gid != 0 || h.Mode&0o7777 != 0o4755 {
				return found{}, fmt.Errorf("sudo belongs to %d:%d with mode %o: owners were lost", h.Uid, h.Gid, h.Mode)
			}
		case "var/lib/dpkg/status":
			data, err := io.ReadAll(io.LimitReader(tr, 64<<20))
			if err != nil {
				return found{}, err
			}
			res.packages = installedPackages(data)
		}
	}
	for name := range missing {
		return found{}, fmt.Errorf("it lacks /%s", name)
	}
	if len(res.packages) == 0 {
		return found{}, errors.New("dpkg knows of no package in it")
	}
	return res, nil
}

// installedPackages lists "name version" of dpkg's status file.
func installedPackages(status []byte) []string {
	var list []string
	for paragraph := range bytes.SplitSeq(status, []byte("\n\n")) {
		var name, version string
		for line := range strings.Lines(string(paragraph)) {
			if v, ok := strings.CutPrefix(line, "Package: "); ok {
				name = strings.TrimSpace(v)
			} else if v, ok := strings.CutPrefix(line, "Version: "); ok {
				version = strings.TrimSpace(v)
			}
		}
		if name != "" {
			list = append(list, name+" "+version)
		}
	}
	return list
}

// createFile writes a new file.
func createFile(path string, fill func(w io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = fill(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
