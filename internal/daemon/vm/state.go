package vm

import "banger/internal/daemon/store"

// transitions lists for each state the states from which it is entered. The
// diagram stands in doc.go. A record begins as creating and ends by being removed.
func transitions(to store.State) []store.State {
	switch to {
	case store.Stopped:
		return []store.State{store.Creating, store.Starting, store.Stopping, store.Stopped}
	case store.Starting:
		return []store.State{store.Stopped}
	case store.Running:
		return []store.State{store.Starting}
	case store.Stopping:
		return []store.State{store.Running, store.Starting, store.Stopping, store.Failed}
	case store.Deleting:
		return []store.State{store.Creating, store.Stopped, store.Starting, store.Running,
			store.Stopping, store.Failed, store.Deleting}
	case store.Failed:
		return []store.State{store.Starting, store.Stopping, store.Stopped}
	}
	return nil
}
