package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// forks is how many times the guest's loop starts /bin/true per sample.
const forks = 20

// loop times, inside the guest, fork, exec and wait of /bin/true: for each line of
// input, a count, it prints the microseconds of one.
const loop = `while read -r n; do
a=$EPOCHREALTIME; for ((i = 0; i < n; i++)); do /bin/true; done; b=$EPOCHREALTIME
echo $(( (${b/[.,]/} - ${a/[.,]/}) / n )); done`

// executions are the samples of one exec benchmark, in ms, one of each per round.
type executions struct {
	exec, version, echo, fork, api []float64
	execCPU, versionCPU            []float64 // of the CLI's process
	daemonCPU                      []float64 // of bangerd, for one exec of the CLI, ms
	guestCPU                       []float64 // of QEMU, for one exec of the CLI, ms
}

// exec measures an exec of true against its ingredients.
func (b *bench) exec(ctx context.Context) (*part, error) {
	i, err := b.host.newInstance("exec")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(i.close)
	if _, err := i.start(ctx); err != nil {
		return nil, err
	}
	c := i.client()
	defer c.close()
	b.progress("exec: boot")
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: "dev"})
	if err != nil {
		return nil, err
	}
	who, err := i.processes(v.Id)
	if err != nil {
		return nil, err
	}
	b.progress("exec: settle")
	settled, err := b.settle(ctx, who.VMM.PID)
	if err != nil {
		return nil, err
	}
	cat, err := c.attach(ctx, v.Id, wire.Exec{Argv: []string{"cat"}, Stdin: true})
	if err != nil {
		return nil, err
	}
	defer cat.conn.Close()
	timer, err := c.attach(ctx, v.Id, wire.Exec{Argv: []string{"bash", "-c", loop}, Stdin: true})
	if err != nil {
		return nil, err
	}
	defer timer.conn.Close()

	m := &executions{}
	n := max(b.n, min(50, 50*b.n/20))
	for k := -1; k < n; k++ { // the first round is not counted
		b.progress("exec: %s", rounds(k, n))
		if err := m.round(ctx, c, who.VMM.PID, cat, timer, k); err != nil {
			return nil, err
		}
		if k < 0 {
			*m = executions{}
		}
	}
	return m.report(settled), nil
}

// round takes one sample of everything. Each round begins with another of them.
func (m *executions) round(ctx context.Context, c *client, qemu int, cat, timer *session, k int) error {
	samples := []func() error{
		func() error { return m.sampleExec(ctx, c, qemu) },
		func() error {
			r, err := c.i.banger(ctx, "version")
			m.version, m.versionCPU = append(m.version, milliseconds(r.took)), append(m.versionCPU, r.cpu)
			return err
		},
		func() error {
			begun := time.Now()
			out, err := cat.ask("x")
			m.echo = append(m.echo, milliseconds(time.Since(begun)))
			if err == nil && out != "x" {
				err = fmt.Errorf("cat answers %q", out)
			}
			return err
		},
		func() error {
			out, err := timer.ask(strconv.Itoa(forks) + "\n")
			if err != nil {
				return err
			}
			micro, err := strconv.ParseFloat(out, 64)
			m.fork = append(m.fork, micro/1000)
			return err
		},
		func() error {
			begun := time.Now()
			s, err := c.attach(ctx, "dev", wire.Exec{Argv: []string{"true"}})
			if err == nil {
				err = s.drain()
			}
			m.api = append(m.api, milliseconds(time.Since(begun)))
			return err
		},
	}
	for j := range samples {
		if err := samples[(max(k, 0)+j)%len(samples)](); err != nil {
			return err
		}
	}
	return nil
}

func (m *executions) sampleExec(ctx context.Context, c *client, qemu int) error {
	daemon := c.i.daemon.pid()
	d, q := cpuOf(daemon), cpuOf(qemu)
	r, err := c.i.banger(ctx, "exec", "dev", "true")
	m.exec, m.execCPU = append(m.exec, milliseconds(r.took)), append(m.execCPU, r.cpu)
	m.daemonCPU, m.guestCPU = append(m.daemonCPU, 1000*(cpuOf(daemon)-d)), append(m.guestCPU, 1000*(cpuOf(qemu)-q))
	return err
}

func (m *executions) report(settled bool) *part {
	sum := pairs(pairs(m.version, m.echo, plus), m.fork, plus)
	p := &part{title: "banger exec dev true, against what it cannot do without"}
	p.note("A guest with the default image, ready and settled. One of each per round, in turn. The echo is one byte through an")
	p.note("attached cat; fork, exec and wait are timed by a bash inside the guest, over %d of /bin/true.", forks)
	if !settled {
		p.note("The guest had NOT settled when the rounds began.")
	}
	p.add(
		row{what: "A  banger exec dev true, the process", unit: "ms", samples: m.exec, cpu: m.execCPU},
		row{what: "   banger version, the process", unit: "ms", samples: m.version, cpu: m.versionCPU},
		row{what: "   one byte echo over the channel", unit: "ms", samples: m.echo},
		row{what: "   fork, exec, wait inside the guest", unit: "ms", samples: m.fork},
		row{what: "B  these three of each round", unit: "ms", samples: sum},
		row{what: "A / B of each round", unit: "×", samples: pairs(m.exec, sum, ratio)}.against(1.3, "≤ 1.3 ×"),
		row{what: "exec of true over the API, no CLI", unit: "ms", samples: m.api},
		row{what: "CPU of bangerd for one A", unit: "CPU ms", samples: m.daemonCPU},
		row{what: "CPU of QEMU for one A", unit: "CPU ms", samples: m.guestCPU},
	)
	return p
}

// settle waits until a QEMU uses less than 5 % of a core over two seconds, at most two
// minutes; it tells whether it came to that.
func (b *bench) settle(ctx context.Context, qemu int) (bool, error) {
	const window, limit = 2 * time.Second, 60
	for range limit {
		before := cpuOf(qemu)
		if err := pause(ctx, window); err != nil {
			return false, err
		}
		if cpuOf(qemu)-before < 0.05*window.Seconds() {
			return true, nil
		}
	}
	return false, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
