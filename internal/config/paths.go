package config

import "path/filepath"

func (l Layout) at(elem ...string) string {
	return filepath.Join(append([]string{l.Root}, elem...)...)
}

// Socket is the API's Unix socket: made by the daemon when it is ready, removed
// when it ends; one left behind by a killed daemon is replaced.
func (l Layout) Socket() string { return l.at("bangerd.sock") }

// DaemonLock is locked by the daemon as long as it runs. The file stays.
func (l Layout) DaemonLock() string { return l.at("bangerd.lock") }

// InstanceFile holds the instance id, see Instance. It stays.
func (l Layout) InstanceFile() string { return l.at("instance") }

// SystemFile is there when the instance is the system's, see MarkSystem. It stays.
func (l Layout) SystemFile() string { return l.at("system") }

// DB is the database of package store, which puts a few files beside it. It stays.
func (l Layout) DB() string { return l.at("banger.db") }

// Log is the daemon's log. The daemon rotates it.
func (l Layout) Log() string { return l.at("bangerd.log") }

// Cache holds downloads and half made images. Anybody may delete its contents while
// no daemon runs.
func (l Layout) Cache() string { return l.at("cache") }

// Kernels holds a directory per kernel.
func (l Layout) Kernels() string { return l.at("kernels") }

// Images holds a directory per image.
func (l Layout) Images() string { return l.at("images") }

// VMs holds a directory per VM.
func (l Layout) VMs() string { return l.at("vms") }

// Lost is where a disk goes that neither the database nor a record.json knows.
// Nothing in it is ever deleted by banger.
func (l Layout) Lost() string { return l.at("lost") }

// Programs holds banger-shim, banger-guest and banger-net as unpacked from the daemon,
// in a directory named after their hash. The daemon removes those of others.
func (l Layout) Programs() string { return l.at("programs") }

// Program is the directory of the programs with a hash.
func (l Layout) Program(hash string) string { return l.at("programs", hash) }

// Firecracker holds firecracker and jailer, put there by banger setup firecracker. It
// stays.
func (l Layout) Firecracker() string { return l.at("firecracker") }

// ImageDir is the directory of one image, written whole by package image (made in
// the cache, renamed into place) and removed with its record.
type ImageDir struct{ path string }

// Image is the directory of the image with an id.
func (l Layout) Image(id string) ImageDir { return ImageDir{l.at("images", id)} }

// Path is the directory itself.
func (d ImageDir) Path() string { return d.path }

// Meta tells what the image is, for people and for a lost database.
func (d ImageDir) Meta() string { return filepath.Join(d.path, "image.json") }

// Rootfs is the root file system, a raw ext4. It is never written to.
func (d ImageDir) Rootfs() string { return filepath.Join(d.path, "rootfs.ext4") }

// KernelDir is the directory of one kernel, written whole by package image and
// replaced by a rename. Running VMs hold links to the files they booted with.
type KernelDir struct{ path string }

// Kernel is the directory of the kernel with a name.
func (l Layout) Kernel(name string) KernelDir { return KernelDir{l.at("kernels", name)} }

// Path is the directory itself.
func (d KernelDir) Path() string { return d.path }

// Meta tells what the kernel is, for people and for a lost database.
func (d KernelDir) Meta() string { return filepath.Join(d.path, "kernel.json") }

// Vmlinux is the uncompressed ELF.
func (d KernelDir) Vmlinux() string { return filepath.Join(d.path, "vmlinux") }

// ModulesDisk is an ext4 with all modules, for the guest's /lib/modules/RELEASE.
func (d KernelDir) ModulesDisk() string { return filepath.Join(d.path, "modules.ext4") }

// Modules holds the few modules that the initramfs loads.
func (d KernelDir) Modules() string { return filepath.Join(d.path, "modules") }

// VMDir is the directory of one VM: made by create, removed by rm. It is the
// working directory of the VM's shim and VMM.
type VMDir struct{ path string }

// VM is the directory of the VM with an id.
func (l Layout) VM(id string) VMDir { return VMDir{l.at("vms", id)} }

// Path is the directory itself.
func (d VMDir) Path() string { return d.path }

// Record is the row of the database again, rewritten by package vm after every
// change; only read when the database has no such row.
func (d VMDir) Record() string { return filepath.Join(d.path, "record.json") }

// Disk is the root disk, with the user's data: only rm, or the undoing of a create,
// removes it.
func (d VMDir) Disk() string { return filepath.Join(d.path, "disk") }

// Run holds what belongs to one run. It is made by start and removed when the VM is
// stopped. The shim's files in it are package shim's, the VMM's sockets its driver's.
func (d VMDir) Run() string { return filepath.Join(d.path, "run") }

func (d VMDir) run(name string) string { return filepath.Join(d.path, "run", name) }

// Lock is held, by an OFD lock, exactly while the VM is alive. Package shim makes it.
func (d VMDir) Lock() string { return d.run("lock") }

// Handles is what the VM holds on the host, written by package vm after each step.
func (d VMDir) Handles() string { return d.run("handles.json") }

// Kernel is a link to the kernel of this run.
func (d VMDir) Kernel() string { return d.run("kernel") }

// Modules is a link to the modules disk of this run.
func (d VMDir) Modules() string { return d.run("modules") }

// Initrd is the initramfs of this run, with the guest's configuration.
func (d VMDir) Initrd() string { return d.run("initrd") }

// Log holds what the runs left behind, bounded, until rm. What is in it is package
// shim's.
func (d VMDir) Log() string { return filepath.Join(d.path, "log") }

// Console is the newest part of the guest's console.
func (d VMDir) Console() string { return filepath.Join(d.path, "log", "console") }
