package imagemgr

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/opstate"
)

// kernelRoom is the space that building a kernel takes at its peak, in bytes.
const kernelRoom = 512 << 20

const kernelSteps = 4

// BuildKernel makes VmlinuxFile, VmlinuzFile, ModulesDiskFile and ModulesDir in
// dir, an empty directory of the caller's, and leaves nothing else there. After an
// error dir is to be given to Remove. Errors are those of BuildImage.
func (b *Builder) BuildKernel(ctx context.Context, r KernelRecipe, dir string, p opstate.Progress) (KernelInfo, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, buildTimeout, fmt.Errorf("it took longer than %s", buildTimeout))
	defer cancel()
	info, err := b.buildKernel(ctx, r, dir, p)
	if err != nil {
		if ctx.Err() != nil {
			return info, context.Cause(ctx)
		}
		return info, explain(err)
	}
	return info, nil
}

func (b *Builder) buildKernel(ctx context.Context, r KernelRecipe, dir string, p opstate.Progress) (KernelInfo, error) {
	p.Step(1, kernelSteps, "fetch package lists")
	a, err := b.prepare(ctx, false)
	if err != nil {
		return KernelInfo{}, err
	}
	if err := roomFor(dir, kernelRoom); err != nil {
		return KernelInfo{}, err
	}
	work := filepath.Join(dir, "apt")
	apt, err := newApt(work, a, r.Suite)
	if err != nil {
		return KernelInfo{}, err
	}
	deb, pkg, err := fetch(ctx, apt, r.Package, p)
	if err != nil {
		return KernelInfo{}, err
	}
	p.Step(3, kernelSteps, "unpack kernel")
	tree := filepath.Join(dir, "tree")
	if _, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{"dpkg-deb", "--extract", deb, tree}}); err != nil {
		return KernelInfo{}, err
	}
	info := KernelInfo{Package: pkg}
	if info.Version, err = kernelFiles(ctx, tree, dir); err != nil {
		return info, err
	}
	p.Step(4, kernelSteps, "make modules disk")
	if info.Modules, err = b.modules(ctx, r, tree, info.Version, dir); err != nil {
		return info, err
	}
	for _, path := range []string{work, tree} {
		if err := b.removeTree(ctx, path); err != nil {
			return info, err
		}
	}
	if info.Size, err = diskUsage(dir); err != nil {
		return info, err
	}
	return info, syncTree(dir)
}

// fetch downloads the package that meta depends on. apt has checked it against the
// signed lists when it returns.
func fetch(ctx context.Context, apt apt, meta string, p opstate.Progress) (deb, pkg string, err error) {
	if _, err := apt.run(ctx, "apt-get", "update", "--quiet"); err != nil {
		return "", "", err
	}
	show, err := apt.run(ctx, "apt-cache", "show", "--no-all-versions", meta)
	if err != nil {
		return "", "", err
	}
	name, err := realPackage(show)
	if err != nil {
		return "", "", fmt.Errorf("cannot use package %s: %w", meta, err)
	}
	uris, err := apt.run(ctx, "apt-get", "download", "--print-uris", "--quiet", name)
	if err != nil {
		return "", "", err
	}
	d, err := parseDownload(uris)
	if err != nil {
		return "", "", fmt.Errorf("cannot download %s: %w", name, err)
	}
	p.Step(2, kernelSteps, "download "+name)
	p.Bytes(0, d.size)
	download := filepath.Join(apt.dir, "download")
	err = watchSize(p, d.size, func() error {
		_, err := apt.run(ctx, "apt-get", "download", "--quiet", name)
		return err
	}, filepath.Join(download, "*.deb"), filepath.Join(download, "partial", "*.deb"), filepath.Join(apt.dir, "cache/archives/partial", "*.deb"))
	if err != nil {
		return "", "", err
	}
	deb = filepath.Join(download, d.file)
	if st, err := os.Stat(deb); err != nil || st.Size() != d.size {
		return "", "", fmt.Errorf("cannot download %s: it is not complete", name)
	}
	p.Bytes(d.size, d.size)
	version := strings.TrimSuffix(strings.TrimPrefix(d.file, name+"_"), "_"+arch+".deb")
	return deb, name + " " + strings.ReplaceAll(version, "%3a", ":"), nil
}

// kernelFiles moves vmlinuz from the package's tree to dir and unpacks it.
func kernelFiles(ctx context.Context, tree, dir string) (version string, err error) {
	found, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("the package holds %d kernels, not one", len(found))
	}
	version = strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	vmlinuz := filepath.Join(dir, VmlinuzFile)
	if err := os.Rename(found[0], vmlinuz); err != nil {
		return "", err
	}
	return version, writeVmlinux(ctx, vmlinuz, filepath.Join(dir, VmlinuxFile))
}

// modules makes the disk of all modules and the folder of those that the initramfs
// loads, and returns the names of these in the order of loading.
func (b *Builder) modules(ctx context.Context, r KernelRecipe, tree, version, dir string) ([]string, error) {
	root, err := moduleTree(tree, version, filepath.Join(tree, "depmod"))
	if err != nil {
		return nil, err
	}
	if _, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{"depmod", "--basedir", filepath.Join(tree, "depmod"), version}}); err != nil {
		return nil, err
	}
	names, err := b.bootModules(ctx, r, root, filepath.Join(dir, ModulesDir))
	if err != nil {
		return nil, err
	}
	c, err := measure(root)
	if err != nil {
		return nil, err
	}
	spec := fsSpec{image: filepath.Join(dir, ModulesDiskFile), tree: root, label: "banger-modules"}
	spec.size, spec.inodes = packedSize(c)
	if err := makeExt4(ctx, spec, b.asOwner); err != nil {
		return nil, err
	}
	return names, checkExt4(ctx, spec.image)
}

// moduleTree moves the modules to where depmod looks below base: some builds of it
// know /lib/modules, some /usr/lib/modules, as do packages.
func moduleTree(tree, version, base string) (string, error) {
	for _, lib := range []string{"lib", "usr/lib"} {
		from := filepath.Join(tree, lib, "modules", version)
		if _, err := os.Stat(from); err != nil {
			continue
		}
		to := filepath.Join(base, "usr/lib/modules", version)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return "", err
		}
		if err := os.Symlink("usr/lib", filepath.Join(base, "lib")); err != nil {
			return "", err
		}
		if err := os.Rename(from, to); err != nil {
			return "", err
		}
		// Links to the sources that the package was built from.
		for _, link := range []string{"build", "source"} {
			if err := os.Remove(filepath.Join(to, link)); err != nil && !os.IsNotExist(err) {
				return "", err
			}
		}
		return to, nil
	}
	return "", fmt.Errorf("the package has no modules for %s", version)
}

// bootModules copies the modules that the initramfs loads from root to dir.
func (b *Builder) bootModules(ctx context.Context, r KernelRecipe, root, dir string) ([]string, error) {
	dep, err := os.Open(filepath.Join(root, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer dep.Close()
	builtin, err := os.Open(filepath.Join(root, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	defer builtin.Close()
	paths, err := b.BootModules(dep, r.Boot, builtin)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	var names []string
	for _, path := range paths {
		data, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			return nil, err
		}
		name := filepath.Base(path)
		// The guest has nothing yet to unpack with.
		switch {
		case strings.HasSuffix(name, ".xz"):
			name = strings.TrimSuffix(name, ".xz")
			data, err = filter(ctx, data, "xz", "--decompress", "--stdout")
		case strings.HasSuffix(name, ".zst"):
			name = strings.TrimSuffix(name, ".zst")
			data, err = filter(ctx, data, "zstd", "--decompress", "--stdout", "--quiet")
		}
		if err != nil {
			return nil, err
		}
		if !strings.HasSuffix(name, ".ko") {
			return nil, fmt.Errorf("cannot load module %s", path)
		}
		if err := createFile(filepath.Join(dir, name), func(w io.Writer) error {
			_, err := w.Write(data)
			return err
		}); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// measure counts what is below dir, and dir.
func measure(dir string) (c content, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		c.add(info.Size())
		return nil
	})
	return c, err
}

// diskUsage adds up the sizes of the files below dir.
func diskUsage(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		size += info.Size()
		return nil
	})
	return size, err
}
