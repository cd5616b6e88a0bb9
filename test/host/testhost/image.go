package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

//go:embed recipe.sh
var recipe string

// image is a directory with the files vmlinuz, initrd and disk. Nobody writes to them.
type image string

func (i image) file(name string) string { return filepath.Join(string(i), name) }

// cacheDir is that of all tests; see HACKING.md.
func cacheDir() (string, error) {
	dir := os.Getenv("BANGER_TEST_CACHE")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(cache, "banger-test")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(filepath.Join(dir, "testhost"), 0o755)
}

// findImage gives the image that the recipe makes, from the cache or made now. Two
// builders wait for each other, and an image that could not be finished has no name.
func findImage(ctx context.Context, cache string) (image, error) {
	sum := sha256.Sum256([]byte(recipe))
	dir := filepath.Join(cache, "testhost", hex.EncodeToString(sum[:8]))
	unlock, err := lock(ctx, filepath.Join(cache, "testhost", "build.lock"), "the image to be built")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return image(dir), nil
	}
	if os.Getuid() != 0 {
		return "", fmt.Errorf("cannot build the test host's image: it takes root, once")
	}
	progress("building the test host's image, once")
	begin := time.Now()
	// Under the lock: what lies here is of a builder that died.
	unfinished := filepath.Join(cache, "testhost", "unfinished")
	if err := os.RemoveAll(unfinished); err != nil {
		return "", err
	}
	if err := os.Mkdir(unfinished, 0o755); err != nil {
		return "", err
	}
	defer os.RemoveAll(unfinished)
	build := exec.CommandContext(ctx, "bash", "-c", recipe, "recipe", unfinished)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		return "", fmt.Errorf("cannot build the test host's image: %w", err)
	}
	if err := os.Rename(unfinished, dir); err != nil {
		return "", err
	}
	progress("image built in %.0f s", time.Since(begin).Seconds())
	return image(dir), nil
}
