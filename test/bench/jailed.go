package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/guest/wire"
)

// jailedParts are the parts that run on the system's daemon, in the test host.
func jailedParts() []benchmark {
	return []benchmark{{"jailed", (*bench).jailed}, {"exec", (*bench).exec}, {"jailed-memory", (*bench).jailedMemory}}
}

// jailed measures what banger adds to a script that starts Firecracker by hand.
func (b *bench) jailed(ctx context.Context) (*part, error) {
	i, err := b.host.newInstance("jailed")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()
	var with []created
	var alone []bareJail
	var r *jailRecipe
	defer func() { r.remove() }()
	banger := func(k int) error {
		b.progress("jailed: %s, banger", rounds(k, b.n))
		m, next, err := b.createJailed(ctx, c, fmt.Sprintf("jailed%d", k+1))
		if err != nil {
			return err
		}
		r.remove()
		r = next
		if k >= 0 {
			with = append(with, m)
		}
		return nil
	}
	bare := func(k int) error {
		b.progress("jailed: %s, bare", rounds(k, b.n))
		m, err := b.bareJail(ctx, r, fmt.Sprintf("bare%d", k+1))
		if err == nil && k >= 0 {
			alone = append(alone, m)
		}
		return err
	}
	for k := -1; k < b.n; k++ { // the first pair is not counted
		first, second := banger, bare
		if k%2 == 1 {
			first, second = bare, banger
		}
		if err := errors.Join(first(k), second(k)); err != nil {
			return nil, err
		}
	}
	return jailedReport(with, alone), nil
}

// createJailed is banger's half of a pair.
func (b *bench) createJailed(ctx context.Context, c *client, name string) (created, *jailRecipe, error) {
	var m created
	cpu := cpuOfDaemon(c.i.daemon.pid())
	begun := time.Now()
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: name, Ready: bangerv1.Ready_READY_AGENT, Memory: jailedSize, Cpus: 1})
	if err != nil {
		return m, nil, err
	}
	s, err := c.attach(ctx, v.Id, wire.Exec{Argv: echo()})
	if err != nil {
		return m, nil, err
	}
	if _, err := s.next(); err != nil {
		return m, nil, fmt.Errorf("no first byte: %w", err)
	}
	m.total = milliseconds(time.Since(begun))
	who, err := c.i.processes(v.Id)
	if err != nil {
		return m, nil, err
	}
	m.daemon, m.shim = cpuOfDaemon(c.i.daemon.pid())-cpu, cpuOf(who.Shim.PID)
	m.cpu = m.daemon + m.shim + cpuOf(who.VMM.PID)
	if err := s.drain(); err != nil {
		return m, nil, err
	}
	r, err := c.i.captureJail(ctx, v.Id)
	if err != nil {
		return m, nil, err
	}
	return m, r, c.remove(ctx, v.Id)
}

// jailedSize is the memory of each guest, in bytes.
const jailedSize = 512 << 20

// jailRecipe is all that a boot of one of banger's VMs was made of.
type jailRecipe struct {
	argv  []string
	dir   config.VMDir // holds links to kernel, modules and initramfs
	calls []apiCall    // of Firecracker's API
	image string       // the root file system
	id    string
}

type apiCall struct {
	path string
	body json.RawMessage
}

// captureJail asks the Firecracker of a running VM what it was told.
func (i *instance) captureJail(ctx context.Context, id string) (*jailRecipe, error) {
	plain, err := i.capture(id)
	if err != nil {
		return nil, err
	}
	r := &jailRecipe{argv: plain.argv, dir: plain.dir, image: plain.image, id: id}
	jail := jailBelow(i.layout.VM(id), id)
	res, err := apiClient(jail).Get("http://firecracker/vm/config")
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var told struct {
		Machine json.RawMessage `json:"machine-config"`
		Boot    json.RawMessage `json:"boot-source"`
		Drives  []struct {
			ID       string `json:"drive_id"`
			Path     string `json:"path_on_host"`
			ReadOnly bool   `json:"is_read_only"`
			Root     bool   `json:"is_root_device"`
			Cache    string `json:"cache_type"`
		}
		Vsock struct {
			CID  int    `json:"guest_cid"`
			Path string `json:"uds_path"`
		}
	}
	if err := json.NewDecoder(res.Body).Decode(&told); err != nil {
		return nil, err
	}
	add := func(path string, body any) {
		data, merr := json.Marshal(body)
		err = errors.Join(err, merr)
		r.calls = append(r.calls, apiCall{path, data})
	}
	var machine struct {
		CPUs   int `json:"vcpu_count"`
		Memory int `json:"mem_size_mib"`
	}
	var boot struct {
		Kernel string `json:"kernel_image_path"`
		Initrd string `json:"initrd_path"`
		Args   string `json:"boot_args"`
	}
	if err := errors.Join(json.Unmarshal(told.Machine, &machine), json.Unmarshal(told.Boot, &boot)); err != nil {
		return nil, err
	}
	add("/machine-config", machine)
	add("/boot-source", boot)
	for _, d := range told.Drives {
		add("/drives/"+d.ID, d)
	}
	add("/entropy", struct{}{})
	add("/vsock", told.Vsock)
	add("/actions", map[string]string{"action_type": "InstanceStart"})
	return r, err
}

func (r *jailRecipe) remove() {
	if r != nil {
		os.RemoveAll(r.dir.Path())
	}
}

// jailBelow is the root of the jail that the jailer makes of banger's arguments.
func jailBelow(dir config.VMDir, id string) string {
	return filepath.Join(dir.Run(), "jail", "firecracker", id, "root")
}

func apiClient(jail string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return wire.DialUnix(ctx, jail, "run/api.sock")
		},
	}}
}

// bareJail is one boot by hand.
type bareJail struct {
	total, attach float64 // ms, to the first byte; of it, the disk
	cpu           float64 // seconds of the tools and of Firecracker, up to the first byte
}

// bareJail does what banger does, by the host's tools: a disk by losetup and dmsetup, the
// jail's files, mknod, jailer, the calls of the API, and an echo over vsock.
func (b *bench) bareJail(ctx context.Context, r *jailRecipe, name string) (m bareJail, err error) {
	dir := b.host.bare().VM(name)
	if err := os.MkdirAll(dir.Run(), 0o700); err != nil {
		return m, err
	}
	j := &byHand{ctx: ctx, dir: dir, name: "bench-" + name}
	defer func() { err = errors.Join(err, j.close()) }()
	begun := time.Now()
	if err := j.attach(r.image); err != nil {
		return m, err
	}
	m.attach = milliseconds(time.Since(begun))
	if err := j.jail(r); err != nil {
		return m, err
	}
	conn, err := j.boot(r)
	if err != nil {
		return m, err
	}
	defer conn.Close()
	var at time.Time
	out := writerFunc(func(p []byte) (int, error) {
		if at.IsZero() {
			at, m.cpu = time.Now(), j.cpu+cpuOf(j.vmm.Process.Pid)
		}
		return len(p), nil
	})
	if _, err := wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: echo()}}, wire.Stdio{Out: out}); err != nil {
		return m, err
	}
	if at.IsZero() {
		return m, errors.New("the echo in the bare guest says nothing")
	}
	m.total = milliseconds(at.Sub(begun))
	return m, nil
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// byHand is a Firecracker that this program started with the host's tools.
type byHand struct {
	ctx   context.Context
	dir   config.VMDir
	name  string // of the dm device
	loops []string
	vmm   *exec.Cmd
	ended chan struct{}
	cpu   float64 // of the tools that ended
}

func (j *byHand) tool(argv ...string) (string, error) {
	cmd := exec.CommandContext(j.ctx, argv[0], argv[1:]...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	j.cpu += cpuOfState(cmd.ProcessState)
	return strings.TrimSpace(string(out)), nil
}

// attach makes a snapshot of the image on a sparse file.
func (j *byHand) attach(image string) error {
	store := j.dir.Disk()
	if _, err := j.tool("truncate", "-s", "1G", store); err != nil {
		return err
	}
	for _, argv := range [][]string{{"losetup", "--find", "--show", "--read-only", image}, {"losetup", "--find", "--show", store}} {
		loop, err := j.tool(argv...)
		if err != nil {
			return err
		}
		j.loops = append(j.loops, loop)
	}
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	_, err = j.tool("dmsetup", "create", j.name, "--table",
		fmt.Sprintf("0 %d snapshot %s %s PO 8", info.Size()/512, j.loops[0], j.loops[1]))
	return err
}

// jail fills the tree that the jailer takes over.
func (j *byHand) jail(r *jailRecipe) error {
	jail := jailBelow(j.dir, r.id)
	if err := os.MkdirAll(filepath.Join(jail, "run"), 0o755); err != nil {
		return err
	}
	for from, to := range map[string]string{r.dir.Kernel(): "run/kernel", r.dir.Initrd(): "run/initrd", r.dir.Modules(): "run/modules"} {
		if err := os.Link(from, filepath.Join(jail, to)); err != nil {
			return err
		}
	}
	numbers, err := j.tool("dmsetup", "info", "--columns", "--noheadings", "--separator", " ", "--options", "major,minor", j.name)
	if err != nil {
		return err
	}
	major, minor, _ := strings.Cut(numbers, " ")
	if _, err := j.tool("mknod", filepath.Join(jail, "disk"), "b", major, minor); err != nil {
		return err
	}
	owner := r.argv[indexOf(r.argv, "--uid")+1] + ":" + r.argv[indexOf(r.argv, "--gid")+1]
	_, err = j.tool("chown", owner, jail, filepath.Join(jail, "run"), filepath.Join(jail, "disk"))
	return err
}

func indexOf(list []string, s string) int {
	for k, v := range list {
		if v == s {
			return k
		}
	}
	return -1
}

// boot runs the jailer, makes the calls, and dials the agent.
func (j *byHand) boot(r *jailRecipe) (net.Conn, error) {
	j.vmm = exec.Command(r.argv[0], r.argv[1:]...)
	j.vmm.Dir, j.vmm.Env = j.dir.Path(), []string{"LC_ALL=C.UTF-8"}
	j.vmm.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var said bytes.Buffer
	j.vmm.Stdout, j.vmm.Stderr = &said, &said
	if err := j.vmm.Start(); err != nil {
		return nil, err
	}
	j.ended = make(chan struct{})
	go func() { j.vmm.Wait(); close(j.ended) }()
	jail := jailBelow(j.dir, r.id)
	c := apiClient(jail)
	for _, k := range r.calls {
		if err := j.call(c, k); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, said.Bytes())
		}
	}
	return j.dial(jail)
}

// call makes one call, the first of them as often as it takes for Firecracker to listen.
func (j *byHand) call(c *http.Client, k apiCall) error {
	for end := time.Now().Add(callTimeout); ; time.Sleep(2 * time.Millisecond) {
		req, err := http.NewRequestWithContext(j.ctx, http.MethodPut, "http://firecracker"+k.path, bytes.NewReader(k.body))
		if err != nil {
			return err
		}
		res, err := c.Do(req)
		if err == nil {
			answer, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if res.StatusCode != http.StatusNoContent {
				return fmt.Errorf("PUT %s %s: %s", k.path, k.body, answer)
			}
			return nil
		}
		if time.Now().After(end) || j.ctx.Err() != nil {
			return err
		}
	}
}

// dial connects to the agent as soon as it listens.
func (j *byHand) dial(jail string) (net.Conn, error) {
	for end := time.Now().Add(bootTimeout); ; time.Sleep(5 * time.Millisecond) {
		conn, err := wire.DialUnix(j.ctx, jail, "run/v.sock")
		if err == nil {
			_, err = conn.Write([]byte("CONNECT " + strconv.Itoa(wire.VsockPort) + "\n"))
			var line string
			if err == nil {
				line, err = bufio.NewReaderSize(oneByte{conn}, 16).ReadString('\n')
			}
			if err == nil && strings.HasPrefix(line, "OK ") {
				return conn, nil
			}
			conn.Close()
		}
		if time.Now().After(end) || j.ctx.Err() != nil {
			return nil, fmt.Errorf("the bare guest does not answer: %v", err)
		}
	}
}

// oneByte reads no more than was asked for: what follows the line is the guest's.
type oneByte struct{ io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.Reader.Read(p[:1]) }

// close ends it all. It may be called at any time.
func (j *byHand) close() error {
	j.ctx = context.Background()
	if j.vmm != nil && j.vmm.Process != nil {
		j.vmm.Process.Kill()
		<-j.ended
	}
	var errs []error
	if len(j.loops) == 2 {
		_, err := j.tool("dmsetup", "remove", "--retry", j.name)
		errs = append(errs, err)
	}
	for _, loop := range j.loops {
		_, err := j.tool("losetup", "--detach", loop)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, os.RemoveAll(j.dir.Path()))...)
}

func jailedReport(with []created, alone []bareJail) *part {
	total, cpu := column(with, func(m created) float64 { return m.total }), column(with, func(m created) float64 { return m.cpu })
	bareTime, bareCPU := column(alone, func(m bareJail) float64 { return m.total }), column(alone, func(m bareJail) float64 { return m.cpu })
	p := &part{title: "create → first exec in Firecracker, against the same by hand"}
	p.note("A: over the API: Create (ready agent), exec of echo. B: truncate, losetup, dmsetup, links, mknod, chown, jailer, the same calls")
	p.note("of Firecracker's API, the same echo over vsock; the same kernel, initramfs and image, 512 MiB, 1 cpu. Pairs alternate A B, B A.")
	p.add(
		row{what: "A  banger, request → first byte", unit: "ms", samples: total, cpu: cpu},
		row{what: "B  by hand, truncate → first byte", unit: "ms", samples: bareTime, cpu: bareCPU},
		row{what: "own share, A − B of each pair", unit: "ms", samples: pairs(total, bareTime, minus)}.against(250, "≤ 250 ms"),
		row{what: "  B: the disk, truncate to dmsetup", unit: "ms", samples: column(alone, func(m bareJail) float64 { return m.attach })},
		row{what: "  A: bangerd and its tools", unit: "CPU ms", samples: column(with, func(m created) float64 { return 1000 * m.daemon })},
		row{what: "  A: the shim", unit: "CPU ms", samples: column(with, func(m created) float64 { return 1000 * m.shim })},
	)
	return p
}

// jailedMemory measures what an idle VM costs beyond its guest's pages.
func (b *bench) jailedMemory(ctx context.Context) (*part, error) {
	i, err := b.host.newInstance("memory")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: "idle", Memory: jailedSize, Cpus: 1})
	if err != nil {
		return nil, err
	}
	who, err := i.processes(v.Id)
	if err != nil {
		return nil, err
	}
	if _, err := b.settle(ctx, who.VMM.PID); err != nil {
		return nil, err
	}
	vmm, err := pssWithout(who.VMM.PID, jailedSize/2)
	if err != nil {
		return nil, err
	}
	shim, err := pssOf(who.Shim.PID, "Pss")
	if err != nil {
		return nil, err
	}
	p := &part{title: "memory of an idle VM in Firecracker"}
	p.note("PSS. The guest's memory is left out: the mappings of more than half of it.")
	p.add(
		row{what: "firecracker", unit: "MiB", samples: []float64{vmm}},
		row{what: "shim", unit: "MiB", samples: []float64{shim}},
		row{what: "both", unit: "MiB", samples: []float64{vmm + shim}}.against(10, "≤ 10 MiB"),
	)
	return p, nil
}

// pssWithout is the PSS of a process in MiB without its mappings of large bytes and more.
func pssWithout(pid int, large int64) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	total, size := 0.0, int64(0)
	for line := range strings.Lines(string(data)) {
		field := strings.Fields(line)
		if len(field) != 3 || field[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(field[1], 10, 64)
		if err != nil {
			return 0, err
		}
		switch field[0] {
		case "Size:":
			size = kib << 10
		case "Pss:":
			if size < large {
				total += float64(kib) / 1024
			}
		}
	}
	return total, nil
}
