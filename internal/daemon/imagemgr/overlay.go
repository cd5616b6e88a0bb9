package imagemgr

import (
	"archive/tar"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"
)

// File is one file of banger's own in an image. It belongs to root.
type File struct {
	Path   string      // relative to the root, without "./"
	Mode   fs.FileMode // permissions; 0755 with fs.ModeDir for a directory
	Body   string
	Target string // of a symbolic link, which has no Mode and no Body
}

// writeOverlay writes files as a tar archive, which is how they get into a tree
// whose owners are not ours to write as.
func writeOverlay(w io.Writer, files []File, now time.Time) error {
	tw := tar.NewWriter(w)
	for _, f := range files {
		h := &tar.Header{
			Name: "./" + f.Path, Mode: int64(f.Mode.Perm()), ModTime: now,
			Typeflag: tar.TypeReg, Size: int64(len(f.Body)), Format: tar.FormatPAX,
		}
		switch {
		case f.Target != "":
			h.Typeflag, h.Linkname, h.Mode, h.Size = tar.TypeSymlink, f.Target, 0o777, 0
		case f.Mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(tw, f.Body); err != nil {
				return err
			}
		}
	}
	return tw.Close()
}

// debianFiles is what makes a tree of Debian packages a guest of banger.
func debianFiles(suite string, dpkg []string) []File {
	text := func(name string, lines ...string) File {
		return File{Path: name, Mode: 0o644, Body: strings.Join(lines, "\n") + "\n"}
	}
	files := []File{
		// Empty: banger-guest writes both, one per VM. An empty machine-id is not
		// "uninitialized", which would make systemd's first boot of this one.
		{Path: "etc/hostname", Mode: 0o644},
		{Path: "etc/machine-id", Mode: 0o444},
		{Path: "etc/resolv.conf", Mode: 0o644},
		text("etc/hosts",
			"127.0.0.1 localhost",
			"::1 localhost ip6-localhost ip6-loopback"),
		// Empty, so that systemd-remount-fs has nothing to do at each boot until somebody
		// writes a line: the root disk is mounted before the system starts.
		{Path: "etc/fstab", Mode: 0o644},
		text("etc/systemd/system/systemd-remount-fs.service.d/banger.conf",
			"[Unit]",
			"ConditionFileNotEmpty=/etc/fstab"),
		text("etc/environment", "LANG=C.UTF-8"), // for PAM and for the agent alike
		// Not the mirror of the host that built it: that may be one that only the host
		// reaches.
		text("etc/apt/sources.list",
			"deb "+PublicMain+" "+suite+" main",
			"deb "+PublicMain+" "+suite+"-updates main",
			"deb "+publicSecurity+" "+suite+"-security main"),
		text("etc/dpkg/dpkg.cfg.d/banger",
			append([]string{"# Remove this file to get manual pages and translations."}, dpkg...)...),
		// Watching a source tree needs more than the kernel's 128 instances.
		text("etc/sysctl.d/60-banger.conf",
			"fs.inotify.max_user_instances = 1024",
			"fs.inotify.max_user_watches = 1048576"),
		text("etc/systemd/journald.conf.d/banger.conf",
			"[Journal]",
			"RuntimeMaxUse=32M",
			"SystemMaxUse=128M"),
		// Without udev these nodes are made by kmod, for root alone.
		text("etc/tmpfiles.d/banger.conf",
			"z /dev/fuse 0666 root root -",
			"z /dev/net/tun 0666 root root -"),
		// The log is in memory until somebody makes the directory.
		text("etc/systemd/system/systemd-journal-flush.service.d/banger.conf",
			"[Unit]",
			"ConditionPathIsDirectory=/var/log/journal"),
		// graphical.target adds nothing but its own units.
		{Path: "etc/systemd/system/default.target", Target: "/lib/systemd/system/multi-user.target"},
		{Path: "etc/systemd/system-generators", Mode: fs.ModeDir | 0o755},
	}
	for _, unit := range maskedUnits() {
		files = append(files, File{Path: path.Join("etc/systemd/system", unit), Target: "/dev/null"})
	}
	for _, generator := range maskedGenerators() {
		files = append(files, File{Path: path.Join("etc/systemd/system-generators", generator), Target: "/dev/null"})
	}
	// Packages such as a JRE make links there and fail without the directories, which
	// path-exclude keeps away.
	for section := '1'; section <= '8'; section++ {
		files = append(files, File{Path: "usr/share/man/man" + string(section), Mode: fs.ModeDir | 0o755})
	}
	return files
}

// maskedUnits costs boot time and means nothing in a virtual machine without
// consoles, udev and firmware. Each process that is not started saves some 50 ms
// of a boot under software emulation.
func maskedUnits() []string {
	return []string{
		// Nobody logs in on a console; without udev a getty on ttyS0 waits for its
		// device for ever, and the boot never counts as finished.
		"getty.target", "serial-getty@ttyS0.service",
		"systemd-ask-password-console.path", "systemd-ask-password-wall.path",
		// It would ask questions on the console.
		"systemd-firstboot.service",
		// The accounts of packages are made when they are installed.
		"systemd-sysusers.service",
		// The kernel's generator is seeded by virtio-rng.
		"systemd-random-seed.service",
		// Records of boots in utmp that only "last reboot" reads.
		"systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
		// Debugging the kernel, hugetlbfs, configfs, FUSE's control files: a mount and
		// a modprobe each. What is needed of it can be mounted by hand.
		"sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount",
		"sys-fs-fuse-connections.mount", "dev-hugepages.mount",
		"systemd-journald-audit.socket",
		// banger-guest grows the file system; this would load two modules first.
		"systemd-repart.service",
	}
}

// maskedGenerators look at every boot for disks to decrypt, partitions, a
// hibernated image, a pending system update, commands on the kernel's command line
// and consoles. Those for fstab, rc.local and init scripts stay.
func maskedGenerators() []string {
	return []string{
		"systemd-cryptsetup-generator", "systemd-debug-generator", "systemd-getty-generator",
		"systemd-gpt-auto-generator", "systemd-hibernate-resume-generator",
		"systemd-integritysetup-generator", "systemd-run-generator",
		"systemd-system-update-generator", "systemd-veritysetup-generator",
	}
}
