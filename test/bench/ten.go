package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

const (
	guests      = 10
	guestMemory = 256 << 20
)

// crowd is guests that were booted at once.
type crowd struct {
	up   []float64 // s, from the first request to each one's agent
	cpu  []float64 // s, of all processes of each guest when all were up
	qemu []float64 // MiB, resident
	shim []float64 // MiB, resident
}

// ten boots ten guests at once, by banger and then bare.
func (b *bench) ten(ctx context.Context) (*part, error) {
	i, err := b.host.newInstance("ten")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()
	b.progress("ten: %d guests by banger", guests)
	with, r, answered, err := b.tenByBanger(ctx, c)
	if err != nil {
		return nil, err
	}
	defer r.remove()
	rss, err := memoryOf(i.daemon.pid(), "VmRSS")
	if err != nil {
		return nil, err
	}
	if err := c.removeAll(ctx); err != nil {
		return nil, err
	}
	b.progress("ten: %d guests bare", guests)
	alone, err := b.tenBare(ctx, r)
	if err != nil {
		return nil, err
	}

	p := &part{title: fmt.Sprintf("%d guests of 256 MiB at once, ready agent, against as many bare ones", guests)}
	p.note("1 CPU each. Times from the first request to each guest's agent, s. CPU: QEMU (and shim) of each guest when all were up.")
	p.add(
		row{what: "banger: guests that came up and ran true", unit: "of 10", samples: []float64{float64(answered)},
			target: "all", verdict: map[bool]string{true: met, false: missed}[answered == guests]},
		row{what: "banger, request → agent", unit: "s", samples: with.up, cpu: with.cpu},
		row{what: "bare, fork → agent", unit: "s", samples: alone.up, cpu: alone.cpu},
		row{what: "RSS of QEMU by banger", unit: "MiB", samples: with.qemu},
		row{what: "RSS of QEMU bare", unit: "MiB", samples: alone.qemu},
		row{what: "RSS of the shim", unit: "MiB", samples: with.shim}.against(4, "≤ 4 MiB"),
		row{what: "RSS of bangerd with all of them", unit: "MiB", samples: []float64{rss}}.against(60, "≤ 60 MiB"),
	)
	return p, nil
}

// tenByBanger also returns the recipe of one of the guests and how many ran a command.
func (b *bench) tenByBanger(ctx context.Context, c *client) (crowd, *recipe, int, error) {
	var mu sync.Mutex
	var m crowd
	var ids []string
	begun := time.Now()
	err := together(guests, func(k int) error {
		v, err := c.create(ctx, &bangerv1.CreateVMRequest{
			Name: fmt.Sprintf("ten%d", k+1), Cpus: 1, Memory: guestMemory, Ready: bangerv1.Ready_READY_AGENT})
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		m.up, ids = append(m.up, time.Since(begun).Seconds()), append(ids, v.Id)
		return nil
	})
	if len(ids) == 0 {
		return m, nil, 0, err
	}
	if err != nil {
		b.progress("ten: %v", err) // it shows as a target that is missed
	}
	answered := 0
	for _, id := range ids {
		who, err := c.i.processes(id)
		if err != nil {
			return m, nil, 0, err
		}
		qemu, qerr := memoryOf(who.VMM.PID, "VmRSS")
		shim, serr := memoryOf(who.Shim.PID, "VmRSS")
		if err := errors.Join(qerr, serr); err != nil {
			return m, nil, 0, err
		}
		m.qemu, m.shim = append(m.qemu, qemu), append(m.shim, shim)
		m.cpu = append(m.cpu, cpuOf(who.VMM.PID, who.Shim.PID))
	}
	for _, id := range ids {
		s, err := c.attach(ctx, id, wire.Exec{Argv: []string{"true"}})
		if err == nil {
			err = s.drain()
		}
		if err != nil {
			b.progress("ten: %v", err)
			continue
		}
		answered++
	}
	r, err := c.i.capture(ids[0])
	return m, r, answered, err
}

func (b *bench) tenBare(ctx context.Context, r *recipe) (crowd, error) {
	var m crowd
	var all []*bare
	for k := range guests {
		q, err := b.host.place(ctx, r, fmt.Sprintf("ten%d", k+1))
		if err != nil {
			return m, err
		}
		defer b.cleanUp(q.close)
		all = append(all, q)
	}
	m.up = make([]float64, guests)
	begun := time.Now()
	err := together(guests, func(k int) error {
		if err := all[k].start(); err != nil {
			return err
		}
		_, err := all[k].hello(ctx)
		m.up[k] = time.Since(begun).Seconds()
		return err
	})
	if err != nil {
		return m, err
	}
	for _, q := range all {
		rss, err := memoryOf(q.pid(), "VmRSS")
		if err != nil {
			return m, err
		}
		m.qemu, m.cpu = append(m.qemu, rss), append(m.cpu, cpuOf(q.pid()))
	}
	return m, nil
}
