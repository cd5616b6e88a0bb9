package fcproc

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
)

// Release is where the tested release comes from.
const Release = "https://github.com/firecracker-microvm/firecracker/releases/download/v" + Tested +
	"/firecracker-v" + Tested + "-x86_64.tgz"

// checksums are the SHA-256 of the tested release's programs.
func checksums() map[string]string {
	return map[string]string{
		firecracker: "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
		jailer:      "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
	}
}

const (
	// maxProgram bounds one program, and maxArchive what is read of an archive, in bytes.
	maxProgram = 64 << 20
	maxArchive = 1 << 30
	// stallTimeout bounds the wait for a download's beginning.
	stallTimeout = 30 * time.Second
)

// Install puts firecracker and jailer into dir, in the place of those that are there, and
// returns their version. from is a release's archive (.tgz) or a directory that has both;
// empty is the download of Release. Programs that say they are of the Tested version must
// be that release's. scratch is a directory on dir's file system. note is told what goes
// on. What was begun is undone when it fails or ctx ends; VMs that run have copies.
func Install(ctx context.Context, dir, scratch, from string, note func(string)) (string, error) {
	temp, err := os.MkdirTemp(scratch, "firecracker-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	if err := collect(ctx, temp, from, note); err != nil {
		return "", err
	}
	found, err := inspect(ctx, temp, from == "")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(temp, 0o755); err != nil {
		return "", err
	}
	return found, replace(temp, dir)
}

// Uninstall removes what Install put into dir. Absent is success.
func Uninstall(dir string) error { return os.RemoveAll(dir) }

// collect copies the two programs to temp.
func collect(ctx context.Context, temp, from string, note func(string)) error {
	if from == "" {
		return download(ctx, temp, note)
	}
	info, err := os.Stat(from)
	if err != nil {
		return api.Errorf(api.NotFound, "cannot use %s: %w", from, err)
	}
	if info.IsDir() {
		return copyDir(ctx, temp, from)
	}
	f, err := os.OpenFile(from, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if !info.Mode().IsRegular() {
		return api.Errorf(api.Invalid, "%s is no file and no directory", from)
	}
	return unpack(ctx, temp, f, from)
}

func download(ctx context.Context, temp string, note func(string)) error {
	note("downloading " + Release)
	client := &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, ResponseHeaderTimeout: stallTimeout, TLSHandshakeTimeout: stallTimeout,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, Release, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return noDownload(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return noDownload(ctx, fmt.Errorf("%s answers %s", Release, res.Status))
	}
	return unpack(ctx, temp, res.Body, Release)
}

func noDownload(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return api.Errorf(api.NotReady, "cannot download Firecracker: %w", err).
		WithHint("banger setup firecracker --from firecracker-v%s-x86_64.tgz", Tested)
}

// programName is what the programs are called in an archive and in a directory: alone, or
// with version and architecture.
var programName = regexp.MustCompile(`^(firecracker|jailer)(-v\d+\.\d+\.\d+-[a-z0-9_]+)?$`)

func copyDir(ctx context.Context, temp, from string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		m := programName.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		file := filepath.Join(from, e.Name())
		info, err := os.Stat(file)
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		err = put(ctx, temp, m[1], f, from)
		f.Close()
		if err != nil {
			return err
		}
	}
	return both(temp, from)
}

func unpack(ctx context.Context, temp string, r io.Reader, from string) error {
	broken := func(err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return api.Errorf(api.Invalid, "cannot read %s: %w", from, err).
			WithHint("banger setup firecracker --from FILE, with FILE a release's .tgz")
	}
	zipped, err := gzip.NewReader(r)
	if err != nil {
		return broken(err)
	}
	archive := tar.NewReader(io.LimitReader(zipped, maxArchive))
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return both(temp, from)
		}
		if err != nil {
			return broken(err)
		}
		m := programName.FindStringSubmatch(path.Base(h.Name))
		if m == nil || h.Typeflag != tar.TypeReg {
			continue
		}
		if err := put(ctx, temp, m[1], archive, from); err != nil {
			return broken(err)
		}
	}
}

// put writes one program.
func put(ctx context.Context, temp, name string, r io.Reader, from string) error {
	f, err := os.OpenFile(filepath.Join(temp, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s has two of %s", from, name)
	}
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(untilDone{ctx, r}, maxProgram+1))
	if err == nil && n > maxProgram {
		err = fmt.Errorf("%s is larger than %d MiB", name, maxProgram>>20)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// untilDone is a reader that ends with ctx.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if err := context.Cause(u.ctx); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

func both(temp, from string) error {
	for _, name := range []string{firecracker, jailer} {
		if _, err := os.Stat(filepath.Join(temp, name)); err != nil {
			return api.Errorf(api.Invalid, "%s has no %s", from, name).
				WithHint("banger setup firecracker --from FILE, with FILE a release's .tgz")
		}
	}
	return nil
}

// inspect asks the programs in dir what they are. What was downloaded is held against the
// checksums before: it is not run if it is something else.
func inspect(ctx context.Context, dir string, downloaded bool) (string, error) {
	forged := api.Errorf(api.Refused, "these are not the programs of the release %s: their checksums are others", Tested).
		WithHint("banger setup firecracker")
	genuine := true
	for name, want := range checksums() {
		sum, err := checksum(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		genuine = genuine && sum == want
	}
	if downloaded && !genuine {
		return "", forged.WithHint("banger setup firecracker --from firecracker-v%s-x86_64.tgz", Tested)
	}
	version, err := pairVersion(ctx, setup{Firecracker: filepath.Join(dir, firecracker), Jailer: filepath.Join(dir, jailer)})
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil { // in which dir is a place that nobody knows
		return "", api.Errorf(api.Invalid, "%s", strings.ReplaceAll(err.Error(), dir+"/", ""))
	}
	if version == Tested && !genuine {
		return "", forged
	}
	return version, nil
}

func checksum(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// replace puts temp in the place of dir in one step; temp then holds what was there.
func replace(temp, dir string) error {
	err := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		err = os.Rename(temp, dir)
	}
	if err != nil {
		return fmt.Errorf("cannot put Firecracker into %s: %w", dir, err)
	}
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.Sync()
}
