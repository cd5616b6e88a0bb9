// Package vm owns the life of VMs: their states, what each holds on the host, and
// the operations that change both.
//
// Everything that a VM holds on the host is a row of one table (table.go): create
// acquires the rows of scope vm, start those of scope run, in order; stop,
// rollback, delete and recovery release them in reverse, by one loop. There is no
// other clean-up code. To make a VM hold something new, add a row.
//
//	             create                start                ready
//	(nothing) ──────────▶ creating ──▶ stopped ──▶ starting ──▶ running
//	                          │          ▲  │         │            │ stop, or the
//	                    undone│          │  │         │rolled back │ guest ended
//	                          ▼          │  │         ▼            ▼
//	(nothing) ◀────────── deleting ◀─────┼──┘      stopped      stopping
//	                          ▲          └──────────────────────────┘
//	                          └── failed: a release did not succeed; stop and
//	                              delete run the releases again, start refuses.
//	                              A delete that is stuck stays deleting.
//
// The record in SQLite says what was intended and is written before acting. Whether
// a VM really runs is asked of its lock (package shim). What it holds lives in
// memory and in run/handles.json, and dies with the host's boot.
//
// An operation takes the VM's slot first (package opstate), then vmLocks for each
// short change of the record; no lock is held over guest I/O, a boot or a pull. A change
// of the network needs no slot: it has networkLocks until banger-net has answered.
// The daemon may be killed at any instruction: Recover makes the world fit the
// records again.
package vm
