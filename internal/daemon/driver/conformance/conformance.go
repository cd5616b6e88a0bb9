// Package conformance holds the contracts of package driver as tests: one suite per
// contract, run on the fake and on every real driver, so that what the fake promises
// to the manager's tests is what the real ones do. A suite takes what only its caller
// can make (a directory on the right file system, a guest that boots) and asserts
// nothing that the contract does not say.
package conformance

import (
	"context"
	"testing"
	"time"
)

// patience bounds each wait for something that must happen: an emulated guest on a
// busy machine takes its time.
const patience = 2 * time.Minute

// within is a context for what must end in time.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}
