package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"banger/internal/config"
	"banger/internal/daemon/qemuproc"
	"banger/internal/daemon/rootdisk"
	"banger/internal/daemon/store"
	"banger/internal/daemon/vm"
	"banger/internal/guest/wire"
	"banger/internal/shim"
)

// recipe is all that a boot of one of banger's VMs was made of, so that QEMU can be
// started in the same way without banger.
type recipe struct {
	argv, env []string
	magic     []byte
	id        string
	dir       config.VMDir // holds links to kernel, modules and initramfs
	disk      string       // the driver that made it
	size      int64
	image     string
}

// capture takes the recipe of a running VM.
func (i *instance) capture(id string) (*recipe, error) {
	from := i.layout.VM(id)
	var cfg shim.Config
	var handles vm.Handles
	var rec store.VM
	for path, into := range map[string]any{filepath.Join(from.Run(), "shim.json"): &cfg, from.Handles(): &handles, from.Record(): &rec} {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(data, into); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	r := &recipe{
		argv: cfg.Argv, env: cfg.Env, magic: handles.Magic, id: id, dir: i.host.bare().VM("recipe-" + id),
		disk: rec.DiskDriver, size: rec.Disk, image: i.layout.Image(rec.ImageID).Rootfs(),
	}
	return r, linkRun(from, r.dir)
}

// bare is laid out like a state directory, so that all of QEMU's paths are the same.
func (h *host) bare() config.Layout { return config.Layout{Root: filepath.Join(h.root, "bare")} }

// linkRun makes run/ of to as it is in from.
func linkRun(from, to config.VMDir) error {
	if err := os.MkdirAll(to.Run(), 0o700); err != nil {
		return err
	}
	return errors.Join(os.Link(from.Kernel(), to.Kernel()), os.Link(from.Modules(), to.Modules()), os.Link(from.Initrd(), to.Initrd()))
}

func (r *recipe) remove() {
	if r != nil {
		os.RemoveAll(r.dir.Path())
	}
}

// bare is a QEMU that this program started itself.
type bare struct {
	recipe *recipe
	dir    config.VMDir
	cmd    *exec.Cmd
	serial *wire.Serial
	begun  time.Time
	stderr bytes.Buffer
	ended  chan struct{}

	answered time.Time // when the echo's first byte came
}

// place makes the disk and all else that QEMU needs, below a name of its own. It is no
// part of the boot: that begins with start.
func (h *host) place(ctx context.Context, r *recipe, name string) (*bare, error) {
	b := &bare{recipe: r, dir: h.bare().VM(name), ended: make(chan struct{})}
	if err := linkRun(r.dir, b.dir); err != nil {
		return nil, err
	}
	disk, err := rootdisk.ByName(r.disk)
	if err != nil {
		return nil, err
	}
	if err := disk.Create(ctx, r.image, b.dir.Disk(), r.size); err != nil {
		return nil, err
	}
	b.serial = wire.NewSerial(func(ctx context.Context) (net.Conn, error) {
		return wire.DialUnix(ctx, b.dir.Path(), qemuproc.AgentSocket)
	}, r.magic)
	return b, nil
}

// start executes QEMU. Its console, which banger's shim keeps, goes to /dev/null.
func (b *bare) start() error {
	b.cmd = exec.Command(b.recipe.argv[0], b.recipe.argv[1:]...)
	b.cmd.Dir, b.cmd.Env, b.cmd.Stderr = b.dir.Path(), b.recipe.env, &b.stderr
	// A session of its own, as the shim has: the kernel's autogroups share the CPU by them.
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	b.begun = time.Now()
	if err := b.cmd.Start(); err != nil {
		return err
	}
	go func() { b.cmd.Wait(); close(b.ended) }()
	return nil
}

func (b *bare) pid() int { return b.cmd.Process.Pid }

// hello waits until the agent has answered and returns the time since the start.
func (b *bare) hello(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	go func() {
		select {
		case <-b.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	conn, err := b.serial.Dial(ctx)
	var hello wire.Hello
	if err == nil {
		err = wire.Call(ctx, conn, wire.Request{Op: wire.OpHello, Nonce: "bare"}, &hello)
	}
	took := time.Since(b.begun)
	select {
	case <-b.ended:
		return 0, fmt.Errorf("the bare QEMU ended: %s", b.stderr.Bytes())
	default:
	}
	if err == nil && hello.ID != b.recipe.id {
		err = fmt.Errorf("another guest answers: %q", hello.ID)
	}
	return took, err
}

// echo runs the command that a create is measured with, and returns QEMU's CPU seconds
// at its first byte.
func (b *bare) echo(ctx context.Context) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := b.serial.Dial(ctx)
	if err != nil {
		return 0, err
	}
	out := &firstByte{b: b}
	_, err = wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: echo()}}, wire.Stdio{Out: out})
	if err == nil && b.answered.IsZero() {
		err = errors.New("the echo in the bare guest says nothing")
	}
	return out.cpu, err
}

// firstByte notes when something is written to it, and QEMU's CPU seconds then.
type firstByte struct {
	b   *bare
	cpu float64
}

func (f *firstByte) Write(p []byte) (int, error) {
	if len(p) > 0 && f.b.answered.IsZero() {
		f.b.answered, f.cpu = time.Now(), cpuOf(f.b.pid())
	}
	return len(p), nil
}

func echo() []string { return []string{"echo", "banger"} }

// close ends QEMU and removes its files. It may be called at any time after place.
func (b *bare) close() error {
	b.serial.Close()
	if b.cmd != nil && b.cmd.Process != nil {
		b.cmd.Process.Kill()
		select {
		case <-b.ended:
		case <-time.After(30 * time.Second):
			return fmt.Errorf("the bare QEMU %d does not die", b.pid())
		}
	}
	return os.RemoveAll(b.dir.Path())
}
