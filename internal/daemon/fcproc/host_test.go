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
// binary, which does nothing there.
func TestConformance(t *testing.T) {
	need.Need(t, "testhost")
	kernels := filepath.Join(os.Getenv("BANGER_TEST_CACHE"), "golden/kernels/debian-cloud")
	v := New(os.Getenv("BANGER_FIRECRACKER_DIR"))
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
