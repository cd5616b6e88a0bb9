package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/qemuproc"
	"banger/internal/guest/wire"
)

const (
	loadSize   = 64 << 20 // bytes of an up or down
	soakSize   = 200 << 20
	connects   = 50  // per sample
	echoCount  = 200 // per sample
	crowdSize  = 500
	netIdle    = 20 * time.Second
	netWindows = 3 // of netIdle
	// stall is what no echo may take while others connect: the shortest time after which
	// Linux sends a lost segment again (TCP_RTO_MIN).
	stall = 200 // ms
)

// The card of slirp, which QEMU gets beside banger's own.
const (
	slirpMAC   = "52:54:00:00:00:09"
	slirpSetUp = `set -e
for d in /sys/class/net/*; do
	[ "$(cat "$d/address")" = ` + slirpMAC + ` ] && card=${d##*/}
done
ip link set "$card" up
ip addr replace 10.0.3.15/24 dev "$card"
ip route replace ` + peerSlirp + `/32 via 10.0.3.2 dev "$card"
ip -o route get ` + peerOurs + `
ip -o route get ` + peerSlirp
)

// netSamples are the samples of one card.
type netSamples struct {
	peer             string
	up, down         []float64 // MiB/s
	upCPU, downCPU   []float64 // seconds of QEMU and banger-net
	connect, rtt     []float64 // ms
	crowd, crowdTime []float64 // connections that worked, ms
	median, worst    []float64 // ms, of the echo beside the crowd
}

// netBench is the guest with both cards.
type netBench struct {
	b         *bench
	qemu, net int // pids
	guest     *session
	watch     *session
	ours      netSamples
	slirp     netSamples
	upCPU     []float64 // ms of banger-net per 64 MiB
	downCPU   []float64
}

// network measures banger-net against QEMU's own user network, slirp, in the same guest.
func (b *bench) network(ctx context.Context) (*part, error) {
	if os.Geteuid() != 0 {
		return nil, skipped("it makes network namespaces, which needs root")
	}
	w, err := newWorld()
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(w.close)
	i, err := b.host.newInstance("network")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	wrapper, err := b.host.wrapQEMU()
	if err != nil {
		return nil, err
	}
	i.env, i.via = []string{qemuproc.ProgramEnv + "=" + wrapper}, w.host.do
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()
	b.progress("network: boot")
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: "net"})
	if err != nil {
		return nil, err
	}
	who, err := i.processes(v.Id)
	if err != nil {
		return nil, err
	}
	m := &netBench{b: b, qemu: who.VMM.PID, net: who.Net.PID, ours: netSamples{peer: peerOurs}, slirp: netSamples{peer: peerSlirp}}
	b.progress("network: settle")
	settled, err := b.settle(ctx, m.qemu)
	if err != nil {
		return nil, err
	}
	p := &part{title: "the network of a guest, against QEMU's own user network (slirp)"}
	p.note("One guest with both cards, one boot; the peer is this program, in a namespace of its own. Pairs alternate A B, B A.")
	p.note("The MTU of slirp's card is its own, 1500; that of banger's is what banger sets. A connect is connect(2) in the guest,")
	p.note("the median of %d; an echo is one byte, the median of %d. CPU of a row: QEMU and banger-net.", connects, echoCount)
	if !settled {
		p.note("The guest had NOT settled when the part began.")
	}
	idle, err := m.idle(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.prepare(ctx, c, v.Id); err != nil {
		return nil, err
	}
	defer m.guest.conn.Close()
	defer m.watch.conn.Close()
	soaked, err := m.soak()
	if err != nil {
		return nil, err
	}
	for k := -1; k < b.n; k++ { // the first round is not counted
		b.progress("network: %s", rounds(k, b.n))
		if err := m.round(ctx, k); err != nil {
			return nil, err
		}
	}
	now, err := i.processes(v.Id)
	if err != nil || now.Net.PID != m.net {
		return nil, fmt.Errorf("banger-net %d was replaced by %d: %w", m.net, now.Net.PID, cmp.Or(err, errors.New("it died")))
	}
	m.report(p)
	p.add(idle...)
	p.add(soaked...)
	return p, nil
}

// wrapQEMU writes a program that is QEMU, with slirp's card beside banger's.
func (h *host) wrapQEMU() (string, error) {
	qemu, err := exec.LookPath(cmp.Or(os.Getenv(qemuproc.ProgramEnv), qemuproc.Program))
	if err == nil {
		qemu, err = filepath.Abs(qemu)
	}
	if err != nil {
		return "", err
	}
	script := `#!/bin/sh
case " $* " in
*" -netdev stream,"*)
	set -- "$@" -netdev user,id=slirp,net=10.0.3.0/24 -device virtio-net-device,netdev=slirp,mac=` + slirpMAC + `
esac
exec '` + strings.ReplaceAll(qemu, "'", `'\''`) + `' "$@"
`
	path := filepath.Join(h.bin, "qemu-with-slirp")
	return path, os.WriteFile(path, []byte(script), 0o755)
}

// idle measures banger-net before anybody uses it.
func (m *netBench) idle(ctx context.Context) ([]row, error) {
	memory, err := m.memory("idle", 8)
	if err != nil {
		return nil, err
	}
	var used []float64
	for k := range netWindows {
		m.b.progress("network: idle, window %d of %d", k+1, netWindows)
		before := cpuOf(m.net)
		if err := pause(ctx, netIdle); err != nil {
			return nil, err
		}
		used = append(used, 1000*(cpuOf(m.net)-before))
	}
	// Less than half of one is 0 when it is rounded.
	cpu := row{what: "banger-net, idle for 20 s", unit: "CPU ms", samples: used}.against(0.5, "0 ms")
	return append([]row{cpu}, memory...), nil
}

// memory is what banger-net has now.
func (m *netBench) memory(when string, limit float64) ([]row, error) {
	all, err := pssOf(m.net, "Pss")
	own, oerr := pssOf(m.net, "Pss_Anon")
	return []row{
		row{what: "PSS of banger-net, " + when, unit: "MiB", samples: []float64{all}}.against(limit, fmt.Sprintf("≤ %.0f MiB", limit)),
		{what: "  of it not the program's file", unit: "MiB", samples: []float64{own}},
	}, errors.Join(err, oerr)
}

// prepare brings netload into the guest and sets slirp's card up.
func (m *netBench) prepare(ctx context.Context, c *client, vm string) error {
	program := filepath.Join(m.b.host.bin, "netload")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", program, "./test/bench/netload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build netload: %w\n%s", err, out)
	}
	file, err := os.Open(program)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := c.i.bangerFrom(ctx, file, "exec", "-i", "-u", "root", vm, "sh", "-c", "cat >/tmp/netload && chmod 755 /tmp/netload"); err != nil {
		return err
	}
	r, err := c.i.banger(ctx, "exec", "-u", "root", vm, "sh", "-c", slirpSetUp)
	if err != nil {
		return err
	}
	ours, slirp, _ := strings.Cut(r.out, "\n")
	if !strings.Contains(slirp, "10.0.3.15") || strings.Contains(ours, "10.0.3.15") {
		return fmt.Errorf("the guest's routes are not as they should be:\n%s", r.out)
	}
	if m.guest, err = c.attach(ctx, vm, wire.Exec{Argv: []string{"/tmp/netload"}, User: "root", Stdin: true}); err != nil {
		return err
	}
	// Who watches goes before the crowd: the guest's own CPUs are not what is measured.
	m.watch, err = c.attach(ctx, vm, wire.Exec{Argv: []string{"nice", "-n", "-15", "/tmp/netload"}, User: "root", Stdin: true})
	return err
}

// soak sends much both ways.
func (m *netBench) soak() ([]row, error) {
	m.b.progress("network: %d MiB each way", soakSize>>20)
	for _, what := range []string{"up", "down"} {
		if _, err := load(m.guest, what, m.ours.peer, soakSize); err != nil {
			return nil, err
		}
	}
	return m.memory(fmt.Sprintf("after %d MiB each way", soakSize>>20), 16)
}

// load asks netload for figures.
func load(s *session, words ...any) ([]float64, error) {
	question := strings.TrimSuffix(fmt.Sprintln(words...), "\n")
	answer, err := s.ask(question + "\n")
	if err != nil {
		return nil, fmt.Errorf("netload, %s: %w", question, err)
	}
	var all []float64
	for word := range strings.FieldsSeq(answer) {
		v, err := strconv.ParseFloat(word, 64)
		if err != nil {
			return nil, fmt.Errorf("netload, %s: %s", question, answer)
		}
		all = append(all, v)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("netload, %s: no answer", question)
	}
	return all, nil
}

// round takes one sample of everything, by both cards.
func (m *netBench) round(ctx context.Context, k int) error {
	for _, sample := range []func(s *netSamples, keep bool) error{m.sampleLoad, m.sampleLatency, m.sampleCrowd} {
		order := []*netSamples{&m.ours, &m.slirp}
		if k%2 != 0 {
			order[0], order[1] = order[1], order[0]
		}
		for _, s := range order {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := sample(s, k >= 0); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *netBench) sampleLoad(s *netSamples, keep bool) error {
	for _, way := range []struct {
		what           string
		rate, all, net *[]float64
	}{{"up", &s.up, &s.upCPU, &m.upCPU}, {"down", &s.down, &s.downCPU, &m.downCPU}} {
		all, net := cpuOf(m.qemu, m.net), cpuOf(m.net)
		took, err := load(m.guest, way.what, s.peer, loadSize)
		if err != nil {
			return err
		}
		if !keep {
			continue
		}
		*way.rate = append(*way.rate, loadSize/(1<<20)/took[0]*1000)
		*way.all = append(*way.all, cpuOf(m.qemu, m.net)-all)
		if s == &m.ours {
			*way.net = append(*way.net, 1000*(cpuOf(m.net)-net))
		}
	}
	return nil
}

func (m *netBench) sampleLatency(s *netSamples, keep bool) error {
	took, err := load(m.guest, "connect", s.peer, connects)
	if err != nil {
		return err
	}
	echo, err := load(m.guest, "echo", s.peer, echoCount)
	if err == nil && keep {
		s.connect, s.rtt = append(s.connect, took[0]), append(s.rtt, echo[0])
	}
	return err
}

func (m *netBench) sampleCrowd(s *netSamples, keep bool) error {
	if answer, err := m.watch.ask("watch " + s.peer + "\n"); err != nil || answer != "watching" {
		return fmt.Errorf("netload, watch: %w", cmp.Or(err, errors.New(answer)))
	}
	crowd, err := load(m.guest, "crowd", s.peer, crowdSize)
	if err != nil {
		return err
	}
	watched, err := load(m.watch, "stop")
	if err != nil {
		return err
	}
	if len(crowd) != 2 || len(watched) != 3 {
		return fmt.Errorf("netload says %v of a crowd and %v of an echo beside it", crowd, watched)
	}
	if keep {
		s.crowd, s.crowdTime = append(s.crowd, crowd[0]), append(s.crowdTime, crowd[1])
		s.median, s.worst = append(s.median, watched[0]), append(s.worst, watched[1])
	}
	return nil
}

func (m *netBench) report(p *part) {
	a, b := m.ours, m.slirp
	p.add(
		row{what: "A  guest → peer, 64 MiB, banger-net", unit: "MiB/s", samples: a.up, cpu: a.upCPU},
		row{what: "B  guest → peer, 64 MiB, slirp", unit: "MiB/s", samples: b.up, cpu: b.upCPU},
		row{what: "guest → peer, A / B of each pair", unit: "×", samples: pairs(a.up, b.up, ratio)}.atLeast(1.5, "≥ 1.5 ×"),
		row{what: "A  peer → guest, 64 MiB, banger-net", unit: "MiB/s", samples: a.down, cpu: a.downCPU},
		row{what: "B  peer → guest, 64 MiB, slirp", unit: "MiB/s", samples: b.down, cpu: b.downCPU},
		row{what: "peer → guest, A / B of each pair", unit: "×", samples: pairs(a.down, b.down, ratio)}.atLeast(1.5, "≥ 1.5 ×"),
		row{what: "A  connect, banger-net", unit: "ms", samples: a.connect},
		row{what: "B  connect, slirp", unit: "ms", samples: b.connect},
		row{what: "connect, A / B of each pair", unit: "×", samples: pairs(a.connect, b.connect, ratio)}.against(1.2, "≤ 1.2 ×"),
		row{what: "A  echo of one byte, banger-net", unit: "ms", samples: a.rtt},
		row{what: "B  echo of one byte, slirp", unit: "ms", samples: b.rtt},
		row{what: "echo, A / B of each pair", unit: "×", samples: pairs(a.rtt, b.rtt, ratio)},
		row{what: "banger-net, 64 MiB guest → peer", unit: "CPU ms", samples: m.upCPU}.against(250, "≤ 250 ms"),
		row{what: "banger-net, 64 MiB peer → guest", unit: "CPU ms", samples: m.downCPU}.against(250, "≤ 250 ms"),
		row{what: fmt.Sprintf("A  of %d connections at once, with an echo", crowdSize), unit: "worked", samples: a.crowd}.atLeast(crowdSize, "all"),
		row{what: "B  slirp", unit: "worked", samples: b.crowd},
		row{what: "A    until all had it", unit: "ms", samples: a.crowdTime},
		row{what: "B    slirp", unit: "ms", samples: b.crowdTime},
		row{what: "A    worst echo of another connection meanwhile", unit: "ms", samples: a.worst}.against(stall, fmt.Sprintf("≤ %d ms: no stall", stall)),
		row{what: "B    slirp", unit: "ms", samples: b.worst},
		row{what: "A    median echo of the other connection", unit: "ms", samples: a.median},
		row{what: "B    slirp", unit: "ms", samples: b.median},
	)
}
