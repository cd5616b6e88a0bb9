package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// bootLimit is what the way to the job may take; 15 s are usual.
const bootLimit = 4 * time.Minute

// machine is one boot of the test host.
type machine struct {
	image   image
	state   string // the disk at /var/lib, raw
	memory  int    // MiB
	console string // file that gets what the kernel says
	shell   bool   // the job's port is a terminal
	shares  []share
}

// share is a directory of this machine that the test host sees.
type share struct {
	tag, dir string
	writable bool
}

// argv is QEMU's. A processor with SVM is emulated: that gives the kernel inside a real
// /dev/kvm. The job's port is the socket at descriptor 3. There is no network.
func (m machine) argv() []string {
	kernel := "console=ttyS0 root=/dev/vda rw rootfstype=ext4 quiet loglevel=4 mitigations=off nokaslr audit=0" +
		" selinux=0 apparmor=0 random.trust_cpu=on tsc=reliable no_timer_check panic=-1 systemd.show_status=0"
	argv := []string{
		"qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "q35,sata=off,smbus=off,i8042=off,vmport=off", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt", "-smp", "2", "-m", strconv.Itoa(m.memory),
		"-kernel", m.image.file("vmlinuz"), "-initrd", m.image.file("initrd"), "-append", kernel,
		// Raw and without flushes: what was written survives the kill of QEMU in the
		// page cache of this machine, as on a disk, and nothing else does.
		"-drive", "if=none,id=root,format=raw,cache=unsafe,snapshot=on,file=" + value(m.image.file("disk")),
		"-device", "virtio-blk-pci,drive=root",
		"-drive", "if=none,id=state,format=raw,cache=unsafe,discard=unmap,file=" + value(m.state),
		"-device", "virtio-blk-pci,drive=state",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
		"-nic", "none",
		"-chardev", "file,id=console,path=" + value(m.console), "-serial", "chardev:console",
		"-chardev", "socket,id=job,fd=3", "-device", "virtio-serial-pci",
	}
	if m.shell {
		argv = append(argv, "-device", "virtconsole,chardev=job")
	} else {
		argv = append(argv, "-device", "virtserialport,chardev=job,name=testhost")
	}
	for _, s := range m.shares {
		fsdev := "local,security_model=none,id=" + s.tag + ",path=" + value(s.dir)
		if !s.writable {
			fsdev += ",readonly=on"
		}
		argv = append(argv, "-fsdev", fsdev, "-device", "virtio-9p-pci,fsdev="+s.tag+",mount_tag="+s.tag)
	}
	return argv
}

// value writes a path as a value of QEMU's, which would end at a comma.
func value(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// boot runs the test host until its job has ended, and gives the job's exit code. With
// orderly it waits until the test host has powered itself off, else it cuts the power.
// QEMU is gone when boot returns, whatever happened.
func (m machine) boot(ctx context.Context, mark string, orderly bool, in io.Reader, out io.Writer) (int, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer ours.Close()
	argv := m.argv()
	qemu := exec.Command(argv[0], argv[1:]...)
	// A group of its own, so that Ctrl-C reaches us alone.
	qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	qemu.ExtraFiles = []*os.File{theirs}
	stderr, err := os.Create(m.console + ".qemu")
	if err != nil {
		return 0, errors.Join(err, theirs.Close())
	}
	defer stderr.Close()
	qemu.Stderr = stderr
	err = qemu.Start()
	theirs.Close()
	if err != nil {
		return 0, fmt.Errorf("cannot start qemu: %w", err)
	}
	ended := make(chan struct{})
	go func() { qemu.Wait(); close(ended) }()
	end := sync.OnceFunc(func() { syscall.Kill(-qemu.Process.Pid, syscall.SIGKILL); <-ended })
	defer end()

	if in != nil {
		go io.Copy(ours, in) // ends with the socket, at the latest with the process
	}
	stop := context.AfterFunc(ctx, func() { ours.Close() })
	defer stop()
	late := time.AfterFunc(bootLimit, func() { ours.Close() })
	defer late.Stop()
	status, err := readJob(ours, mark, out, func() { late.Stop() })
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		end()
		return 0, fmt.Errorf("the test host ended before its job: %w%s", err, m.lastWords())
	}
	if orderly {
		select {
		case <-ended:
		case <-ctx.Done():
			return status, fmt.Errorf("the test host does not power off: %w%s", context.Cause(ctx), m.lastWords())
		case <-time.After(bootLimit):
			return status, fmt.Errorf("the test host does not power off in %s%s", bootLimit, m.lastWords())
		}
	}
	return status, nil
}

// socketPair gives two ends of a connection, one as a file to hand on.
func socketPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	mine := os.NewFile(uintptr(fds[0]), "job")
	defer mine.Close()
	theirs = os.NewFile(uintptr(fds[1]), "job of qemu")
	if ours, err = net.FileConn(mine); err != nil {
		theirs.Close()
	}
	return ours, theirs, err
}

// lastWords are those of QEMU and of the kernel in it.
func (m machine) lastWords() (text string) {
	for _, f := range []struct{ name, path string }{{"qemu", m.console + ".qemu"}, {"console", m.console}} {
		if data, err := os.ReadFile(f.path); err == nil {
			text += tail(f.name, data)
		}
	}
	return text
}

// tail shows the last lines of a text below an error.
func tail(name string, text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, "TCG doesn't support requested feature") })
	if len(lines) == 0 || len(lines) == 1 && lines[0] == "" {
		return ""
	}
	return "\n" + name + ": " + strings.Join(lines[max(0, len(lines)-20):], "\n"+name+": ")
}

// errNoStatus is the end of the port without the line that says how the job ended.
var errNoStatus = errors.New("it said nothing of how the job ended")

// readJob passes on what the job says until the line "MARK exit STATUS". The mark is
// random, and the line "MARK started" comes before all.
func readJob(port io.Reader, mark string, out io.Writer, started func()) (status int, err error) {
	var held []byte // read and not yet passed on, because it may be the mark
	buffer := make([]byte, 32<<10)
	for {
		n, readErr := port.Read(buffer)
		held = append(held, buffer[:n]...)
		for {
			at := bytes.Index(held, []byte(mark))
			found := at >= 0
			if !found {
				at = len(held) - overlap(held, mark)
			}
			if _, err := out.Write(held[:at]); err != nil {
				return 0, err
			}
			held = held[at:]
			line, after, whole := bytes.Cut(held, []byte("\n"))
			if !found || !whole {
				break
			}
			held = after
			if number, ok := strings.CutPrefix(strings.TrimSpace(string(line[len(mark):])), "exit "); ok {
				return strconv.Atoi(number)
			}
			started()
		}
		if errors.Is(readErr, io.EOF) {
			return 0, errNoStatus
		}
		if readErr != nil {
			return 0, readErr
		}
	}
}

// overlap is the length of the longest end of text that mark begins with.
func overlap(text []byte, mark string) int {
	for n := min(len(text), len(mark)-1); n > 0; n-- {
		if bytes.HasSuffix(text, []byte(mark[:n])) {
			return n
		}
	}
	return 0
}
