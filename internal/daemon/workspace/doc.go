// Package workspace places a git repository of the host into a VM and tells what
// changed there. Bytes travel as they lie on the disk: no filter, no end-of-line
// conversion, no hook, no fsmonitor and no textconv of any repository is run, on
// either side.
//
// Three trees explain all of it:
//
//	base   the working tree as it last came in, per file, dirty files included
//	guest  the working tree inside, now
//	host   the working tree on the host, now
//
// Export is the difference base → guest. Prepare merges the three per file: what
// only the host changed is written inside, what only the guest changed stays, what
// is equal on both sides joins the base, and what both changed stays as it is inside,
// keeps its base and is named. What cannot be read inside counts as changed there, and
// what cannot be written inside is left, keeps its base and is named too. The first
// prepare is the same with an empty base and an empty guest, and so is one that
// was interrupted: there is one way in.
//
// The host's repository is only ever read: commands work in a shadow, a private git
// directory with our configuration that borrows the objects of the repository, on a
// copy of its index; new objects are written into the shadow by this package, since
// git would touch the times of packs that already have them. One pack carries
// commits and files into the guest.
//
// Inside, refs/banger/* and .git/banger are ours, all else belongs to the guest:
//
//	refs/banger/base   tree: base
//	refs/banger/next   tree: what base becomes when the prepare under way has ended
//	refs/banger/head   tree: the host's HEAD as it lies on the disk (see snapshot), but
//	                   for what did not come in though it was not changed inside
//	refs/banger/host   commit: the host's HEAD, absent without commits
//	.git/banger/       a git directory without conversions, with a private index
//
// The guest's own index and branch are only moved along with the host's commits, and
// only while the guest has neither commits nor staged changes of its own and every
// file came in; see moveHead.
//
// A guest is hostile: what it says is bounded and is never used to choose a file of
// the host that is sent.
package workspace
