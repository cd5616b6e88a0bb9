package main

import (
	"context"
	"fmt"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// windows is into how many windows the time of an idle guest is cut, for the spread.
const windows = 6

// idle measures what a settled guest that nobody uses costs: with the daemon, with the
// daemon killed, and beside it, in the same windows, a bare one.
func (b *bench) idle(ctx context.Context) (*part, error) {
	i, err := b.host.newInstance("idle")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()
	b.progress("idle: boot")
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: "idle"})
	if err != nil {
		return nil, err
	}
	who, err := i.processes(v.Id)
	if err != nil {
		return nil, err
	}
	r, err := i.capture(v.Id)
	if err != nil {
		return nil, err
	}
	defer r.remove()
	q, err := b.host.place(ctx, r, "idle")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(q.close)
	if err := q.start(); err != nil {
		return nil, err
	}
	if _, err := q.hello(ctx); err != nil {
		return nil, err
	}
	q.serial.Close()
	b.progress("idle: settle for %s", b.settled)
	if err := pause(ctx, b.settled); err != nil {
		return nil, err
	}

	p := &part{title: "an idle guest, with the daemon and with it killed, against a bare one"}
	p.note("The default image and size, ready, settled for %s; %s in %d windows each. The bare guest idles beside it, nobody connected.",
		b.settled, b.idleFor, windows)
	b.progress("idle: %s with the daemon", b.idleFor)
	with := []int{who.VMM.PID, who.Shim.PID, i.daemon.pid()}
	shares, err := b.watch(ctx, with, []int{who.VMM.PID}, []int{who.Shim.PID}, []int{i.daemon.pid()}, []int{q.pid()})
	if err != nil {
		return nil, err
	}
	p.add(idleRow("with bangerd: QEMU, shim, bangerd", shares[0]).onTarget(),
		idleRow("  QEMU", shares[1]), idleRow("  shim", shares[2]), idleRow("  bangerd", shares[3]),
		idleRow("  bare QEMU, same windows", shares[4]))
	memory, err := idleMemory(i.daemon.pid(), who.Shim.PID, who.VMM.PID, q.pid())
	if err != nil {
		return nil, err
	}
	if err := i.kill(); err != nil {
		return nil, err
	}
	b.progress("idle: %s with the daemon killed", b.idleFor)
	shares, err = b.watch(ctx, []int{who.VMM.PID, who.Shim.PID}, []int{q.pid()})
	if err != nil {
		return nil, err
	}
	p.add(idleRow("bangerd killed: QEMU, shim", shares[0]).onTarget(), idleRow("  bare QEMU, same windows", shares[1]))
	p.add(memory...)
	return p, i.stillThere(ctx, v.Id)
}

// watch measures the CPU of groups of processes in the same windows, in percent of a
// core.
func (b *bench) watch(ctx context.Context, groups ...[]int) ([][]float64, error) {
	shares := make([][]float64, len(groups))
	used := func() (at time.Time, cpu []float64) {
		for _, pids := range groups {
			cpu = append(cpu, cpuOf(pids...))
		}
		return time.Now(), cpu
	}
	at, before := used()
	for range windows {
		if err := pause(ctx, b.idleFor/windows); err != nil {
			return nil, err
		}
		now, after := used()
		for g := range groups {
			shares[g] = append(shares[g], 100*(after[g]-before[g])/now.Sub(at).Seconds())
		}
		at, before = now, after
	}
	return shares, nil
}

func idleRow(what string, shares []float64) row { return row{what: what, unit: "%", samples: shares} }

// onTarget judges the whole time, not the median of the windows.
func (r row) onTarget() row {
	sum := 0.0
	for _, s := range r.samples {
		sum += s
	}
	mean := sum / float64(len(r.samples))
	r.target, r.verdict = fmt.Sprintf("< 2 %% in all (%s)", figure(mean)), judge([]float64{mean}, 2)
	return r
}

func idleMemory(daemon, shim, qemu, bare int) ([]row, error) {
	var rows []row
	for _, m := range []struct {
		what, key string
		pid       int
		limit     float64
	}{
		{"RSS of bangerd", "VmRSS", daemon, 60},
		{"  its peak", "VmHWM", daemon, 0},
		{"RSS of the shim", "VmRSS", shim, 4},
		{"  its peak", "VmHWM", shim, 0},
		{"RSS of QEMU", "VmRSS", qemu, 0},
		{"RSS of the bare QEMU", "VmRSS", bare, 0},
	} {
		mib, err := memoryOf(m.pid, m.key)
		if err != nil {
			return nil, err
		}
		r := row{what: m.what, unit: "MiB", samples: []float64{mib}}
		if m.limit > 0 {
			r = r.against(m.limit, fmt.Sprintf("≤ %.0f MiB", m.limit))
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// stillThere starts a daemon again and runs a command: what idled was a guest that
// works.
func (i *instance) stillThere(ctx context.Context, vm string) error {
	if _, err := i.start(ctx); err != nil {
		return err
	}
	c := i.client()
	defer c.close()
	s, err := c.attach(ctx, vm, wire.Exec{Argv: []string{"true"}})
	if err != nil {
		return err
	}
	return s.drain()
}
