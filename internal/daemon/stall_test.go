package daemon

import (
	"context"

	"banger/internal/daemon/opstate"
)

// stallBuild keeps builds waiting until release is closed or they are cancelled.
func stallBuild(release <-chan struct{}) func(context.Context, string, string, opstate.Progress) error {
	return func(ctx context.Context, _, _ string, _ opstate.Progress) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
