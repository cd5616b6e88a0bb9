package qemuproc

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"banger/internal/daemon/driver"
	"banger/internal/guest/wire"
)

const (
	// maxCPUs: without x2APIC, which TCG lacks up to QEMU 8, an APIC id has 8 bits and
	// 255 is the broadcast.
	maxCPUs = 255
	// minMemory is what a Debian kernel with its initramfs still boots in, in bytes.
	minMemory = 128 << 20
	mib       = 1 << 20
	// microvm has 8 virtio-mmio slots (the interrupts 16 to 23, see
	// hw/i386/microvm.c); serial, rng and the network card take three.
	maxDisks = 5

	// tbSize bounds TCG's cache of translated code, in MiB. Without a bound QEMU takes
	// an eighth of the host's memory, at most 1 GiB, per VM, and that on top of the
	// guest's: a compiler run fills it and it is never given back. A boot of systemd
	// alone fills about 130 MiB, so 64 costs time at each boot (a full cache is thrown
	// away as a whole); 256 does not.
	tbSize = 256

	// sandbox denies QEMU what it needs no more once it runs: to start a process, to
	// change its uid, its scheduling and its limits.
	sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
)

// argv is QEMU's command line: a pure function.
func argv(spec driver.Spec, s setup) ([]string, error) {
	if err := validate(spec); err != nil {
		return nil, err
	}
	if why := s.noNetwork(); why != "" && spec.NIC != nil {
		return nil, errors.New(why)
	}
	args := []string{
		s.Program,
		"-name", "guest=" + escape(spec.Name),
		// ACPI stays on: the devices are found through it, stock kernels are built
		// without virtio_mmio.device=. A core of QEMU must not hold the guest's memory.
		"-machine", "microvm,acpi=on,dump-guest-core=off",
	}
	if s.Accel == "kvm" {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		args = append(args, "-accel", "tcg,thread=multi,tb-size="+strconv.Itoa(tbSize), "-cpu", "max")
	}
	args = append(args,
		"-smp", strconv.Itoa(spec.CPUs),
		"-m", strconv.FormatInt(spec.Memory/mib, 10)+"M",
		"-kernel", spec.Kernel,
		"-initrd", spec.Initrd,
		"-append", strings.Join(kernelArgs(s), " "),
		"-nodefaults", "-no-user-config", "-no-reboot",
		"-display", "none",
		"-msg", "timestamp=off",
	)
	if s.Sandbox {
		args = append(args, "-sandbox", sandbox)
	}
	args = append(args,
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
		"-qmp", "unix:"+QMPSocket+",server=on,wait=off",
		"-device", "virtio-serial-device",
		"-chardev", "socket,id=agent,path="+AgentSocket+",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name="+wire.PortName,
		"-device", "virtio-rng-device",
	)
	for i, d := range spec.Disks {
		args = append(args, disk("disk"+strconv.Itoa(i), d)...)
	}
	if spec.NIC != nil {
		args = append(args, nic(*spec.NIC)...)
	}
	return args, nil
}

// nic listens and is dialled, not the other way round: a QEMU that dials does not dial
// again before 8.0, and the network's process may be started anew at any time.
func nic(n driver.NIC) []string {
	return []string{
		"-netdev", "stream,id=net0,server=on,addr.type=unix,addr.path=" + escape(n.Socket),
		"-device", "virtio-net-device,netdev=net0,mac=" + escape(n.MAC),
	}
}

// disk is one node of the file, one of the format, and the device.
func disk(node string, d driver.DiskSpec) []string {
	mode := "off"
	if d.ReadOnly {
		mode = "on"
	}
	// locking=on, not auto: better no VM than one disk in two. The locks of two
	// readers get along.
	file := "file.driver=file,file.filename=" + escape(d.Path) + ",file.locking=on,file.aio=threads" +
		",file.discard=unmap,file.read-only=" + mode
	return []string{
		// Writes land in the host's page cache and are synced when the guest asks for
		// it. What the guest discards becomes a hole.
		"-blockdev", "driver=" + d.Format + ",node-name=" + node + ",discard=unmap,read-only=" + mode +
			",cache.direct=off,cache.no-flush=off," + file,
		// A full host disk is reported to the guest, like a disk that fails. QEMU's
		// default, to stop the guest, would leave it hanging with nobody to go on.
		"-device", "virtio-blk-device,drive=" + node + ",serial=" + escape(d.Serial) + ",werror=report,rerror=report",
	}
}

// kernelArgs is what the machine needs of the kernel's command line. Nothing in it
// weakens the guest: mitigations=off, init_on_alloc=0, nokaslr, audit=0 and apparmor=0
// are often given for speed and were measured to bring none here.
func kernelArgs(s setup) []string {
	args := []string{
		"console=ttyS0",
		// Only what is fatal: each byte of the console is an exit of the VM. A panic
		// raises the level by itself.
		"quiet", "loglevel=1",
		// A panic ends the VM, which is seen, instead of hanging, which is not:
		// reboot at once, and -no-reboot makes that QEMU's end.
		"panic=-1",
		// A restart is a triple fault, which ends QEMU. By itself the kernel, on hardware
		// that it takes for reduced (ACPI) and without EFI, jumps into the firmware, and that
		// into a kernel whose first code has long been freed: whether the CPU faults there
		// or runs in circles for ever depends on what the guest keeps in that memory.
		"reboot=t",
		// Self tests of the crypto code, an eighth of the boot's CPU time under TCG.
		"cryptomgr.notests",
		// virtio-rng comes with a module; whoever asks for random bytes before it must
		// not wait. The CPU is QEMU's or the host's, both trusted with everything.
		"random.trust_cpu=on",
	}
	if s.Accel == "kvm" {
		return args // kvmclock gives the time
	}
	return append(args,
		// The machine has neither HPET nor PM timer, and calibrating against the PIT
		// fails when the host is busy: the kernel then hangs for ever. See hostTSC.
		"tsc_early_khz="+strconv.FormatInt(s.TSC, 10), "tsc=reliable",
		// Its probe of the timer interrupt fails for the same reason.
		"no_timer_check",
		// With kmem accounting systemd's first cgroup patches a static key in the slab
		// allocator while other CPUs run it, and TCG before QEMU 8.1, which does not lock
		// a page that it translates, may keep the breakpoint of that moment for ever: all
		// CPUs then loop in it. Seen in two of some hundred boots.
		"cgroup.memory=nokmem",
	)
}

func validate(spec driver.Spec) error {
	switch {
	case spec.CPUs > maxCPUs:
		return fmt.Errorf("%d cpus: the machine takes %d", spec.CPUs, maxCPUs)
	case spec.Memory < minMemory:
		return fmt.Errorf("%d bytes of memory: the least is %d MiB", spec.Memory, minMemory/mib)
	case len(spec.Disks) > maxDisks:
		return fmt.Errorf("%d disks: the machine takes %d", len(spec.Disks), maxDisks)
	}
	return spec.Validate()
}

// escape doubles the commas of a value: QEMU splits options at single ones.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }
