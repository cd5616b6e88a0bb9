package imagemgr

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"banger/internal/daemon/hostcmd"
)

// Debian's public mirror: the guests', and the host's where its own apt names no other.
const (
	PublicMain     = "http://deb.debian.org/debian"
	publicSecurity = "http://deb.debian.org/debian-security"
)

// debianKeyring is from the package debian-archive-keyring.
const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// archive is where packages come from and how apt gets there.
type archive struct {
	main, security string // base URLs
	keyring        string
	options        []string // of apt, "Acquire::http::Proxy \"…\";"
}

// findArchive takes over from the host's own apt what it needs to reach Debian:
// mirror, proxy, time-outs. Which of the host's sources is Debian is what their
// Release files say. Whatever comes from there is checked against keyring.
func findArchive(ctx context.Context, keyring string) (archive, error) {
	a := archive{main: PublicMain, security: publicSecurity, keyring: keyring}
	targets, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{
		"apt-get", "indextargets", "--format", targetFormat, "Created-By: Packages",
	}})
	if err != nil {
		return a, err
	}
	main, security := mirrors(string(targets))
	if main != "" {
		a.main = main
	}
	if security != "" {
		a.security = security
	}
	dump, err := hostcmd.Run(ctx, hostcmd.Command{Argv: []string{"apt-config", "dump"}})
	if err != nil {
		return a, err
	}
	a.options = append(hostOptions(string(dump)),
		`Acquire::Retries "3";`,
		`Acquire::http::Timeout "60";`,
		`Acquire::https::Timeout "60";`,
		// Of a list that could not be fetched apt keeps the old one and reports success.
		`APT::Update::Error-Mode "any";`,
	)
	return a, nil
}

// targetFormat is one line per index that apt knows. Fields that it does not know
// (yet) stay as they are written here.
const targetFormat = `$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)`

// mirrors finds the base URLs of Debian and of its security updates among the
// host's sources. Before the first "apt-get update" there are no Release files to
// tell; then a source counts that is laid out like Debian's own.
func mirrors(targets string) (main, security string) {
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 || f[2] != "main" {
			continue
		}
		origin, label, uri := f[0], f[1], strings.TrimRight(f[3], "/")
		if !strings.HasPrefix(uri, "http://") && !strings.HasPrefix(uri, "https://") {
			continue
		}
		if strings.HasPrefix(origin, "$") || origin == "" {
			switch path := uri[strings.LastIndex(uri, "/")+1:]; path {
			case "debian":
				origin, label = "Debian", "Debian"
			case "debian-security":
				origin, label = "Debian", "Debian-Security"
			}
		}
		if origin != "Debian" {
			continue
		}
		switch {
		case label == "Debian" && main == "":
			main = uri
		case label == "Debian-Security" && security == "":
			security = uri
		}
	}
	return main, security
}

// hostOption matches what of the host's configuration decides how a mirror is
// reached. The two checks of dates are off where the administrator has a frozen
// mirror; signatures are checked all the same.
var hostOption = regexp.MustCompile(`^Acquire::(https?::[^" ]+|ForceIPv4|ForceIPv6|Check-Valid-Until|Check-Date) "[^"]+";$`)

func hostOptions(dump string) []string {
	var options []string
	for line := range strings.Lines(dump) {
		if line = strings.TrimSpace(line); hostOption.MatchString(line) {
			options = append(options, line)
		}
	}
	return options
}

// sources are the lines of a sources.list for one release.
func (a archive) sources(suite string) []string {
	deb := "deb [arch=" + arch + " signed-by=" + a.keyring + "] "
	return []string{
		deb + a.main + " " + suite + " main",
		deb + a.main + " " + suite + "-updates main",
		deb + a.security + " " + suite + "-security main",
	}
}

// network is the environment of a tool that may have to get through a proxy. extra,
// KEY=VALUE, takes the place of what has its keys: of two values for a key, programs
// differ in which one they see.
func network(extra ...string) []string {
	set := make(map[string]bool)
	for _, kv := range extra {
		key, _, _ := strings.Cut(kv, "=")
		set[key] = true
	}
	env := slices.DeleteFunc(hostcmd.Env(), func(kv string) bool {
		key, _, _ := strings.Cut(kv, "=")
		return set[key]
	})
	for _, name := range []string{"http_proxy", "https_proxy", "all_proxy", "no_proxy"} {
		for _, key := range []string{name, strings.ToUpper(name)} {
			if v := os.Getenv(key); v != "" {
				env = append(env, key+"="+v)
			}
		}
	}
	return append(env, extra...)
}

// apt is an apt of its own in a directory: configuration, state and cache, no
// installed packages.
type apt struct {
	dir string
	env []string
}

// newApt makes an apt in dir, an existing directory, for the packages of suite.
func newApt(dir string, a archive, suite string) (apt, error) {
	for _, sub := range []string{"etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial", "download"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return apt{}, err
		}
	}
	conf := []string{
		fmt.Sprintf("Dir %q;", dir),
		fmt.Sprintf("Dir::Etc %q;", filepath.Join(dir, "etc")),
		fmt.Sprintf("Dir::State %q;", filepath.Join(dir, "state")),
		fmt.Sprintf("Dir::State::status %q;", filepath.Join(dir, "status")),
		fmt.Sprintf("Dir::Cache %q;", filepath.Join(dir, "cache")),
		// No file that takes longer to write than to do without.
		`Dir::Cache::pkgcache "";`, `Dir::Cache::srcpkgcache "";`,
		`APT::Architecture "` + arch + `";`, `APT::Architectures { "` + arch + `"; };`,
		// The directory is ours alone: the user _apt cannot get here.
		`APT::Sandbox::User "root";`,
		`Acquire::Languages "none";`,
		`Acquire::AllowInsecureRepositories "false";`, `Acquire::AllowWeakRepositories "false";`,
		`Acquire::AllowDowngradeToInsecureRepositories "false";`,
		`APT::Get::AllowUnauthenticated "false";`,
	}
	conf = append(conf, a.options...)
	files := map[string]string{
		"apt.conf":         strings.Join(conf, "\n") + "\n",
		"status":           "",
		"etc/sources.list": strings.Join(a.sources(suite), "\n") + "\n",
	}
	for name, body := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
			return apt{}, err
		}
	}
	return apt{dir: dir, env: network("APT_CONFIG=" + filepath.Join(dir, "apt.conf"))}, nil
}

// run runs one of apt's programs; it downloads to download/.
func (a apt) run(ctx context.Context, argv ...string) (string, error) {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: argv, Env: a.env, Dir: filepath.Join(a.dir, "download")})
	return string(out), err
}

// realPackage finds in the output of "apt-cache show META" the kernel package that
// the metapackage depends on.
func realPackage(show string) (name string, err error) {
	for line := range strings.Lines(show) {
		depends, ok := strings.CutPrefix(line, "Depends:")
		if !ok {
			continue
		}
		for dep := range strings.SplitSeq(depends, ",") {
			name, _, _ := strings.Cut(strings.TrimSpace(dep), " ")
			if kernelPackage.MatchString(name) {
				return name, nil
			}
		}
	}
	return "", fmt.Errorf("the package names no kernel that it depends on")
}

var kernelPackage = regexp.MustCompile(`^linux-image-[0-9][a-z0-9.+-]*$`)

// download is one line of "apt-get --print-uris download".
type download struct {
	file string
	size int64
}

func parseDownload(uris string) (download, error) {
	for line := range strings.Lines(uris) {
		var uri, file, sum string
		var size int64
		if _, err := fmt.Sscan(line, &uri, &file, &size, &sum); err != nil || !strings.HasPrefix(uri, "'") {
			continue
		}
		if file != filepath.Base(file) || !strings.HasSuffix(file, ".deb") {
			return download{}, fmt.Errorf("apt names a strange file %q", file)
		}
		return download{file: file, size: size}, nil
	}
	return download{}, fmt.Errorf("apt does not say what it would download")
}
