// Package cli is the command line of banger: one file per verb, each a cobra command
// that turns arguments into calls of the daemon and answers into a table, JSON, a
// stream and an exit code. Main runs it once, in the caller's process and with the
// caller's streams, so tests call it as a function; DaemonMain is what bangerd is.
//
// The rules that every verb keeps: stdout is data and stderr everything else (ui.go);
// an error carries a code, one switch turns codes into exit codes (errors.go); what
// takes time in the daemon is an operation, watched with progress and undone by
// Ctrl-C (operation.go, signals.go); bytes of a guest reach a terminal only through an
// attached stream (stream.go), everything else goes through clean (text.go).
package cli
