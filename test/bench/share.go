package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// created is one create → first exec.
type created struct {
	total     float64 // ms, request to first byte
	toQEMU    float64 // ms, request to QEMU's exec
	fromHello float64 // ms, agent's hello to first byte
	toDone    float64 // of this, hello to the end of the operation as the client sees it
	toExec    float64 // from there to the daemon's 101 to the exec
	cpu       float64 // seconds of QEMU, shim and daemon, up to the first byte
	daemon    float64 // of these, the daemon's and qemu-img's
	shim      float64
}

// share measures what banger adds to a bare boot.
func (b *bench) share(ctx context.Context) (*part, error) {
	i, err := b.host.newInstance("share")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()

	var r *recipe // of the last VM that banger booted
	defer func() { r.remove() }()
	var with []created
	var alone []bareBoot
	banger := func(k int) error {
		b.progress("share: %s, banger", rounds(k, b.n))
		m, next, err := b.createAndExec(ctx, c, fmt.Sprintf("share%d", k+1))
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
		b.progress("share: %s, bare", rounds(k, b.n))
		m, err := b.bootBare(ctx, r, fmt.Sprintf("bare%d", k+1))
		if err == nil && k >= 0 {
			alone = append(alone, m)
		}
		return err
	}
	// The first pair fills the page cache and gives the first recipe; it is not counted.
	for k := -1; k < b.n; k++ {
		first, second := banger, bare
		if k%2 == 1 {
			first, second = bare, banger
		}
		if err := first(k); err != nil {
			return nil, err
		}
		if err := second(k); err != nil {
			return nil, err
		}
	}
	return shareReport(with, alone), nil
}

// createAndExec is banger's half of a pair. It also returns the recipe of the VM, which
// is gone then.
func (b *bench) createAndExec(ctx context.Context, c *client, name string) (created, *recipe, error) {
	var m created
	daemon := c.i.daemon.pid()
	cpu := cpuOfDaemon(daemon)
	begun := time.Now()
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: name, Ready: bangerv1.Ready_READY_AGENT})
	if err != nil {
		return m, nil, err
	}
	done := time.Now()
	s, err := c.attach(ctx, v.Id, wire.Exec{Argv: echo()})
	if err != nil {
		return m, nil, err
	}
	accepted := time.Now()
	if _, err := s.next(); err != nil {
		return m, nil, fmt.Errorf("no first byte: %w", err)
	}
	end := time.Now()
	who, err := c.i.processes(v.Id)
	if err != nil {
		return m, nil, err
	}
	m.daemon, m.shim = cpuOfDaemon(daemon)-cpu, cpuOf(who.Shim.PID)
	m.cpu = m.daemon + m.shim + cpuOf(who.VMM.PID)
	m.total = milliseconds(end.Sub(begun))
	if err := s.drain(); err != nil {
		return m, nil, err
	}
	// The shim writes processes.json anew when QEMU was executed, the daemon handles.json
	// when the agent has said hello.
	dir := c.i.layout.VM(v.Id)
	executed, err := os.Stat(filepath.Join(dir.Run(), "processes.json"))
	if err != nil {
		return m, nil, err
	}
	hello, err := os.Stat(dir.Handles())
	if err != nil {
		return m, nil, err
	}
	m.toQEMU, m.fromHello = milliseconds(executed.ModTime().Sub(begun)), milliseconds(end.Sub(hello.ModTime()))
	m.toDone, m.toExec = milliseconds(done.Sub(hello.ModTime())), milliseconds(accepted.Sub(done))
	r, err := c.i.capture(v.Id)
	if err != nil {
		return m, nil, err
	}
	return m, r, c.remove(ctx, v.Id)
}

// bareBoot is one boot of QEMU without banger.
type bareBoot struct {
	total float64 // ms, fork to the agent's hello
	echo  float64 // ms, from there to the first byte of the same command over the same channel
	cpu   float64 // seconds of QEMU, up to the first byte
}

func (b *bench) bootBare(ctx context.Context, r *recipe, name string) (m bareBoot, err error) {
	q, err := b.host.place(ctx, r, name)
	if err != nil {
		return m, err
	}
	defer b.cleanUp(q.close)
	if err := q.start(); err != nil {
		return m, err
	}
	d, err := q.hello(ctx)
	if err != nil {
		return m, err
	}
	m.total = milliseconds(d)
	begun := time.Now()
	m.cpu, err = q.echo(ctx)
	m.echo = milliseconds(q.answered.Sub(begun))
	return m, err
}

// column takes one figure of each sample.
func column[T any](samples []T, of func(T) float64) []float64 {
	out := make([]float64, len(samples))
	for k, m := range samples {
		out[k] = of(m)
	}
	return out
}

func shareReport(with []created, alone []bareBoot) *part {
	total, cpu := column(with, func(m created) float64 { return m.total }), column(with, func(m created) float64 { return m.cpu })
	toQEMU, fromHello := column(with, func(m created) float64 { return m.toQEMU }), column(with, func(m created) float64 { return m.fromHello })
	bareTime, bareCPU := column(alone, func(m bareBoot) float64 { return m.total }), column(alone, func(m bareBoot) float64 { return m.cpu })
	p := &part{title: "create → first exec, ready agent, against a bare boot"}
	p.note("A: over the API: Create, Watch, exec of echo; no CLI is started. B: the QEMU command line of the last A, the same")
	p.note("kernel, initramfs and image, a new disk made before; from fork to the agent's hello over its port. Pairs alternate A B, B A.")
	p.note("CPU: A is QEMU, shim, bangerd and qemu-img up to the first byte; B is QEMU up to the first byte of the same echo.")
	p.note("The parts of A are told by the times of run/processes.json and run/handles.json, exact to the kernel's tick (1 to 10 ms).")
	p.add(
		row{what: "A  banger, request → first byte", unit: "ms", samples: total, cpu: cpu},
		row{what: "B  bare, fork → hello", unit: "ms", samples: bareTime, cpu: bareCPU},
		row{what: "own share, A − B of each pair", unit: "ms", samples: pairs(total, bareTime, minus)}.against(150, "≤ 150 ms"),
		row{what: "own share, the two parts of each A", unit: "ms", samples: pairs(toQEMU, fromHello, plus)}.against(150, "≤ 150 ms"),
		row{what: "  request → exec of QEMU", unit: "ms", samples: toQEMU},
		row{what: "  (its boot, exec of QEMU → hello)", unit: "ms", samples: column(with, func(m created) float64 { return m.total - m.toQEMU - m.fromHello })},
		row{what: "  hello → first byte", unit: "ms", samples: fromHello},
		row{what: "    hello → operation done", unit: "ms", samples: column(with, func(m created) float64 { return m.toDone })},
		row{what: "    → exec accepted", unit: "ms", samples: column(with, func(m created) float64 { return m.toExec })},
		row{what: "    → first byte", unit: "ms", samples: column(with, func(m created) float64 { return m.fromHello - m.toDone - m.toExec })},
		row{what: "  B: hello → first byte of the echo", unit: "ms", samples: column(alone, func(m bareBoot) float64 { return m.echo })},
		row{what: "CPU of A / CPU of B", unit: "×", samples: pairs(cpu, bareCPU, ratio)}.against(1.10, "≤ 1.10 ×"),
		row{what: "  bangerd and qemu-img", unit: "CPU ms", samples: column(with, func(m created) float64 { return 1000 * m.daemon })},
		row{what: "  the shim", unit: "CPU ms", samples: column(with, func(m created) float64 { return 1000 * m.shim })},
	)
	return p
}

func milliseconds(d time.Duration) float64 { return float64(d) / 1e6 }
