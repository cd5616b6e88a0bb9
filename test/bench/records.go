package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"strings"

	_ "modernc.org/sqlite" // the driver "sqlite"

	bangerv1 "banger/api/banger/v1"
)

const records = 1000

// listings are the samples of the records benchmark, in ms.
type listings struct {
	readyMany, readyFew       []float64
	readyManyCPU, readyFewCPU []float64
	psFirst, ps, psFew        []float64
	psFirstCPU, psCPU         []float64
	psFewCPU, versionCPU      []float64
	version                   []float64
	rss                       []float64 // MiB, of the daemon with many records
}

// records measures what many VMs that do not run cost.
func (b *bench) records(ctx context.Context) (*part, error) {
	many, err := b.host.newInstance("many")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(many.close)
	few, err := b.host.newInstance("few")
	if err != nil {
		return nil, err
	}
	defer b.cleanUp(few.close)
	b.progress("records: %d records", records)
	if err := many.multiply(ctx); err != nil {
		return nil, err
	}
	m := &listings{}
	for k := -1; k < b.n; k++ { // the first round is not counted
		b.progress("records: %s", rounds(k, b.n))
		if err := m.round(ctx, many, few); err != nil {
			return nil, err
		}
		if k < 0 {
			*m = listings{}
		}
	}
	return m.report(), nil
}

// multiply makes one VM, which is not started, and copies of its record and its
// directory. Its disk is real, those of the copies are empty.
func (i *instance) multiply(ctx context.Context) error {
	if _, err := i.start(ctx); err != nil {
		return err
	}
	c := i.client()
	defer c.close()
	v, err := c.create(ctx, &bangerv1.CreateVMRequest{Name: "vm1", NoStart: true})
	if err != nil {
		return err
	}
	record, err := os.ReadFile(i.layout.VM(v.Id).Record())
	if err != nil {
		return err
	}
	if err := i.stop(); err != nil {
		return err
	}
	db, err := sql.Open("sqlite", i.layout.DB())
	if err != nil {
		return err
	}
	defer db.Close()
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for n := 2; n <= records; n++ {
		id, name := fmt.Sprintf("%012x", n), fmt.Sprintf("vm%d", n)
		const copied = `insert into vms select ?, ?, state, ?, image, kernel, cpus, memory, disk, disk_driver, machine_id,
			user_name, user_uid, user_gid, owner, remove_on_release, repository, created_at, last_error, ended from vms where name = 'vm1'`
		if _, err := tx.ExecContext(ctx, copied, id, name, n); err != nil {
			return err
		}
		dir := i.layout.VM(id)
		if err := os.MkdirAll(dir.Log(), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(dir.Record(), []byte(strings.ReplaceAll(string(record), v.Id, id)), 0o600); err != nil {
			return err
		}
		if err := os.WriteFile(dir.Disk(), nil, 0o600); err != nil {
			return err
		}
	}
	return tx.Commit()
}

func (m *listings) round(ctx context.Context, many, few *instance) error {
	ready, cpu, err := startTimed(ctx, many)
	if err != nil {
		return err
	}
	m.readyMany, m.readyManyCPU = append(m.readyMany, ready), append(m.readyManyCPU, cpu)
	list := func(i *instance, lines int, times, cpus *[]float64) error {
		r, err := i.banger(ctx, "ps")
		*times, *cpus = append(*times, milliseconds(r.took)), append(*cpus, r.cpu)
		if n := strings.Count(r.out, "\n"); err == nil && n != lines+1 {
			err = fmt.Errorf("ps prints %d lines", n)
		}
		return err
	}
	if err := list(many, records, &m.psFirst, &m.psFirstCPU); err != nil {
		return err
	}
	if err := list(many, records, &m.ps, &m.psCPU); err != nil {
		return err
	}
	rss, err := memoryOf(many.daemon.pid(), "VmRSS")
	if err != nil {
		return err
	}
	m.rss = append(m.rss, rss)
	r, err := many.banger(ctx, "version")
	if err != nil {
		return err
	}
	m.version, m.versionCPU = append(m.version, milliseconds(r.took)), append(m.versionCPU, r.cpu)
	if err := many.stop(); err != nil {
		return err
	}
	if ready, cpu, err = startTimed(ctx, few); err != nil {
		return err
	}
	m.readyFew, m.readyFewCPU = append(m.readyFew, ready), append(m.readyFewCPU, cpu)
	if err := list(few, 0, &m.psFew, &m.psFewCPU); err != nil {
		return err
	}
	return few.stop()
}

// startTimed starts the daemon of i: ms until it is ready, and its CPU seconds.
func startTimed(ctx context.Context, i *instance) (ready, cpu float64, err error) {
	took, err := i.start(ctx)
	if err != nil {
		return 0, 0, err
	}
	return milliseconds(took), cpuOfDaemon(i.daemon.pid()), nil
}

func (m *listings) report() *part {
	p := &part{title: fmt.Sprintf("%d VM records, against none", records)}
	p.note("The VMs are stopped, each with a directory and a record.json. Ready: from fork of bangerd to its word that it serves.")
	p.add(
		row{what: "bangerd ready, many records", unit: "ms", samples: m.readyMany, cpu: m.readyManyCPU}.against(500, "≤ 500 ms"),
		row{what: "bangerd ready, no record", unit: "ms", samples: m.readyFew, cpu: m.readyFewCPU},
		row{what: "banger ps, many records", unit: "ms", samples: m.ps, cpu: m.psCPU}.against(50, "≤ 50 ms"),
		row{what: "banger ps, many, first after the start", unit: "ms", samples: m.psFirst, cpu: m.psFirstCPU},
		row{what: "banger ps, no record, first", unit: "ms", samples: m.psFew, cpu: m.psFewCPU},
		row{what: "banger version", unit: "ms", samples: m.version, cpu: m.versionCPU},
		row{what: "bangerd RSS, many records", unit: "MiB", samples: m.rss}.against(60, "≤ 60 MiB"),
	)
	return p
}
