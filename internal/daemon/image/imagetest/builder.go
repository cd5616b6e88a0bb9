// Package imagetest holds a stand-in for what makes images and kernels. Only tests
// import it.
package imagetest

import (
	"context"
	"os"
	"path/filepath"

	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/opstate"
)

// Builder is an image.Builder that makes small files with the right names, at once:
// for the fake host, and for tests that are not about images. The zero value is ready.
type Builder struct {
	// Before, unless nil, is called at the beginning of each build with its directory;
	// an error from it is the build's.
	Before func(ctx context.Context, name, dir string, p opstate.Progress) error
}

// size is the size of everything that Builder makes, in bytes, sparse.
const size = 1 << 20

func (b *Builder) begin(ctx context.Context, name, dir string, p opstate.Progress) error {
	p.Step(1, 2, "download packages")
	if b.Before != nil {
		if err := b.Before(ctx, name, dir, p); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	p.Bytes(size, size)
	p.Step(2, 2, "make file system")
	return nil
}

// BuildImage makes an image of 1 MiB.
func (b *Builder) BuildImage(ctx context.Context, r imagemgr.ImageRecipe, dir string, p opstate.Progress) (imagemgr.ImageInfo, error) {
	if err := b.begin(ctx, r.Name, dir, p); err != nil {
		return imagemgr.ImageInfo{}, err
	}
	if err := write(dir, imagemgr.RootfsFile); err != nil {
		return imagemgr.ImageInfo{}, err
	}
	return imagemgr.ImageInfo{Size: size, Packages: []string{"fake 1"}}, nil
}

// BuildKernel makes a kernel with the modules of a disk and a network card.
func (b *Builder) BuildKernel(ctx context.Context, r imagemgr.KernelRecipe, dir string, p opstate.Progress) (imagemgr.KernelInfo, error) {
	if err := b.begin(ctx, r.Name, dir, p); err != nil {
		return imagemgr.KernelInfo{}, err
	}
	modules := []string{"virtio_blk.ko", "virtio_net.ko"}
	if err := os.MkdirAll(filepath.Join(dir, imagemgr.ModulesDir), 0o700); err != nil {
		return imagemgr.KernelInfo{}, err
	}
	files := []string{imagemgr.VmlinuxFile, imagemgr.VmlinuzFile, imagemgr.ModulesDiskFile}
	for _, module := range modules {
		files = append(files, filepath.Join(imagemgr.ModulesDir, module))
	}
	for _, name := range files {
		if err := write(dir, name); err != nil {
			return imagemgr.KernelInfo{}, err
		}
	}
	return imagemgr.KernelInfo{
		Version: "6.1.0-0-fake-amd64", Package: "linux-image-fake 1",
		Size: int64(len(files)) * size, Modules: modules,
	}, nil
}

// Remove removes dir.
func (b *Builder) Remove(ctx context.Context, dir string) error { return os.RemoveAll(dir) }

func write(dir, name string) error {
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("banger fake "+filepath.Base(name)+"\n"), 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}
