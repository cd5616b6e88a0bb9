// Package daemon is bangerd: the composition root that wires store, drivers and
// managers in one readable function (Open), and the handlers that turn API calls
// into calls of a manager. It exports Open, Serve, Close, Doctor and the options of
// Open; everything else is reached through the socket. Only package cli imports it.
//
// A handler decodes, resolves the VM, begins an operation and encodes; whatever
// takes longer runs as an operation (package opstate) whose context belongs to the
// daemon. ARCHITECTURE.md beside this file says who owns which state and lock.
package daemon
