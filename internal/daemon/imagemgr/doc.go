// Package imagemgr makes images and kernels out of Debian's signed packages. It
// knows recipes (what goes in), the tools that carry them out, and how to look at
// the result; it knows no registry: a caller hands in an empty directory and gets
// back what is in it, or an error and a directory to Remove.
//
//	image   mmdebstrap → a tar → unpacked, with banger's own files over it → ext4
//	kernel  apt-get download → unpacked → vmlinux, boot modules, ext4 of all modules
//
// Both work as root and as an ordinary user, with the same result: a user's steps
// run in a user namespace in which the user is root and the user's subuids are the
// other owners. Nothing touches the host's own package state, and nothing depends
// on its release: apt gets a configuration and state of its own, and checks
// signatures against Debian's archive keyring.
//
// The rule of use: everything that decides what comes out is in the recipe, so
// that Recipe.Hash says whether a result on disk is current. Bump its Version when
// the code here changes the result.
package imagemgr
