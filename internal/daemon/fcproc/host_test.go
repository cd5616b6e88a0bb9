package fcproc

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/daemon/initrd"
	"banger/internal/guest/wire"
	"banger/test/need"
)

// The suite on the real jailer, Firecracker and kernel. The guest's init is this test
// binary, which does nothing there. The programs are a packager's: files with the version
// in the name, and links to them.
func TestConformance(t *testing.T) {
	need.Need(t, "testhost")
	kernels := filepath.Join(os.Getenv("BANGER_TEST_CACHE"), "golden/kernels/debian-cloud")
	v := New(linked(t, os.Getenv(DirEnv)))
	conformance.VMM(t, conformance.VMMHost{
		VMM: v,
		Prepare: func(t *testing.T, dir string) driver.Spec {
			spec := machine(t, dir)
			spec.CPUs, spec.Memory = 1, minMemory
			copyFile(t, filepath.Join(kernels, "vmlinux"), filepath.Join(dir, spec.Kernel))
			makeInitrd(t, filepath.Join(dir, spec.Initrd))
			for _, d := range spec.Disks {
				if err := os.Truncate(filepath.Join(dir, d.Path), 1<<20); err != nil {
					t.Fatal(err)
				}
			}
			return spec
		},
		Start: startJailed,
	})
}

func linked(t *testing.T, from string) string {
	t.Helper()
	files, links := t.TempDir(), t.TempDir()
	for _, name := range []string{firecracker, jailer} {
		file := filepath.Join(files, name+"-v"+Tested+"-x86_64")
		copyFile(t, filepath.Join(from, name), file)
		if err := os.Symlink(file, filepath.Join(links, name)); err != nil {
			t.Fatal(err)
		}
	}
	return links
}

// The tested release has the checksums that are pinned, in a directory and in an archive
// like the project's.
func TestInstallTheRelease(t *testing.T) {
	need.Need(t, "testhost")
	files := make(map[string][]byte)
	for _, name := range []string{firecracker, jailer} {
		data, err := os.ReadFile(filepath.Join(os.Getenv(DirEnv), name))
		if err != nil {
			t.Fatal(err)
		}
		files["release-v"+Tested+"-x86_64/"+name+"-v"+Tested+"-x86_64"] = data
	}
	for _, from := range []string{os.Getenv(DirEnv), archive(t, files)} {
		p := newPlace(t)
		if version, err := p.install(from); err != nil || version != Tested {
			t.Errorf("%s: %q, %v", from, version, err)
			continue
		}
		p.holds(Tested)
		if _, err := inspect(t.Context(), p.dir, true); err != nil {
			t.Errorf("as a download: %v", err)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

func makeInitrd(t *testing.T, file string) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := initrd.Write(f, os.Args[0], nil, wire.Config{}); err != nil {
		t.Fatal(err)
	}
}

// startJailed runs the jailer until kill is called.
func startJailed(t *testing.T, dir string, c driver.Command) func() {
	t.Helper()
	cmd := exec.Command(c.Argv[0], c.Argv[1:]...)
	cmd.Env, cmd.Dir = c.Env, dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	kill := func() {
		cmd.Process.Kill()
		<-ended
	}
	t.Cleanup(kill)
	return kill
}
