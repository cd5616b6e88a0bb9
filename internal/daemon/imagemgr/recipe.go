package imagemgr

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
)

// The names that can be pulled. They are part of the user interface.
const (
	DebianBookworm = "debian-bookworm"
	DebianCloud    = "debian-cloud"
)

// The files that are made in the directory that a caller hands in.
const (
	RootfsFile      = "rootfs.ext4"
	VmlinuxFile     = "vmlinux"      // uncompressed ELF, with a PVH entry point
	VmlinuzFile     = "vmlinuz"      // the bzImage as packaged
	ModulesDiskFile = "modules.ext4" // its root is the guest's /lib/modules/RELEASE
	ModulesDir      = "modules"      // the modules that the initramfs loads
)

// arch is Debian's name of the only machine that is built for.
const arch = "amd64"

// ImageRecipe says what an image is made of.
type ImageRecipe struct {
	Name     string
	Title    string // for people
	Kernel   string // the name of the kernel to boot it with
	Version  int    // of the code in this package that carries it out
	Suite    string // of Debian
	Packages []string
	Files    []File   // over what the packages bring
	Exclude  []string // tar patterns, relative to "./", of what does not go in
	Dpkg     []string // lines for dpkg.cfg, while building and afterwards in the guest
}

// KernelRecipe says what a kernel is made of.
type KernelRecipe struct {
	Name    string
	Title   string
	Version int
	Suite   string
	Package string // a metapackage that depends on the real one
	// Boot names the modules that the initramfs loads to find disk, channel and
	// entropy; what they depend on is added.
	Boot []string
}

// Hash names everything that decides what comes out, but for the packages that
// Debian has at the time.
func (r ImageRecipe) Hash() string { return hash(r) }

// Hash names everything that decides what comes out, but for the packages that
// Debian has at the time.
func (r KernelRecipe) Hash() string { return hash(r) }

func hash(recipe any) string {
	data, err := json.Marshal(recipe)
	if err != nil {
		panic("imagemgr: a recipe is plain data: " + err.Error())
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:16])
}

// Images returns the recipes of all images that can be pulled.
func Images() []ImageRecipe { return []ImageRecipe{debianBookworm()} }

// Kernels returns the recipes of all kernels that can be pulled.
func Kernels() []KernelRecipe { return []KernelRecipe{debianCloud()} }

func debianCloud() KernelRecipe {
	return KernelRecipe{
		Name: DebianCloud, Title: "Debian 12 cloud kernel", Version: 1,
		Suite: "bookworm", Package: "linux-image-cloud-amd64",
		Boot: []string{"virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "virtio_net", "vmw_vsock_virtio_transport"},
	}
}

// debianBookworm is a development machine that boots in seconds: what a shell, git
// and "make" in somebody's repository need to get going, and no compiler, since
// the right one differs and apt-get installs it in a moment. No udev, D-Bus or
// logind: nothing here has hot-plugged devices or seats, and they cost a second of
// boot. No SSH server: banger has a channel of its own.
func debianBookworm() ImageRecipe {
	const suite = "bookworm"
	dpkg := []string{
		"path-exclude=/usr/share/man/*", "path-exclude=/usr/share/info/*",
		"path-exclude=/usr/share/locale/*", "path-include=/usr/share/locale/locale.alias",
		// Licences must stay with what they license.
		"path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright",
	}
	return ImageRecipe{
		Name: DebianBookworm, Title: "Debian 12 bookworm", Kernel: DebianCloud, Version: 2,
		Suite: suite,
		Packages: []string{
			"systemd-sysv",
			"kmod",              // modprobe: Docker, overlay and nft load modules
			"iproute2",          // ip, ss
			"netbase",           // /etc/protocols, /etc/services
			"libnss-myhostname", // the host name resolves without a line in /etc/hosts
			"procps",            // ps, top, sysctl
			"sudo",
			"ca-certificates", "curl", "git",
			"openssh-client", // git over ssh
			"make", "patch",
			"less", "vim-tiny", "file",
			"unzip", "xz-utils", // what tool chains come packed in
		},
		Files:   debianFiles(suite, dpkg),
		Exclude: debianExcludes(),
		Dpkg:    dpkg,
	}
}

// debianExcludes is what a build leaves behind that a guest must not have, or that
// is made anew in each guest.
func debianExcludes() []string {
	return []string{
		"./dev/*", // devtmpfs covers it, and mknod needs privileges
		"./run/*", "./tmp/*", "./proc/*", "./sys/*",
		"./etc/apt/apt.conf.d/99mmdebstrap", // the host's proxy
		"./etc/dpkg/dpkg.cfg.d/99mmdebstrap",
		"./etc/ssh/ssh_host_*",
		"./var/lib/apt/lists/*", "./var/cache/apt/*.bin", "./var/cache/apt/archives/*",
		"./var/cache/debconf/*-old", "./var/lib/dpkg/*-old",
		"./var/log/apt/*", "./var/log/*.log",
		// Nothing but comments, and a process at each boot to read them. Files in
		// modules-load.d work.
		"./etc/modules", "./etc/modules-load.d/modules.conf",
		// Without this directory journald keeps its log in memory; a user who wants it
		// on disk makes it.
		"./var/log/journal",
		// Enabled by their packages. Left disabled, not masked: in a machine that runs
		// for an hour at a time they are surprises (apt-daily locks the package
		// database), but a user may enable them.
		"./etc/systemd/system/timers.target.wants/*",
		"./etc/systemd/system/multi-user.target.wants/e2scrub_reap.service",
		"./etc/systemd/system/sysinit.target.wants/systemd-pstore.service",
		"./etc/systemd/system/getty.target.wants/*",
	}
}
