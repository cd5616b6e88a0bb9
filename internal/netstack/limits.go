package netstack

import "time"

// What a guest may make this process hold. Together it stays below 64 MiB: see
// bounds_test.go, and heap.go for what all else misses.
const (
	// maxConnections bounds the guest's TCP connections, those to published ports apart.
	maxConnections = 1024
	// maxHandshakes bounds those that are being made, on either side; see handshakes.
	maxHandshakes = 512
	// maxFlows bounds UDP flows.
	maxFlows = 512
	// maxPings and maxLookups bound what is under way.
	maxPings   = 32
	maxLookups = 256
	// linkQueue bounds what waits for QEMU to read it, in bytes.
	linkQueue = 4 << 20
)

const (
	// dialTimeout bounds a connection to the outside: a third of what Linux takes.
	dialTimeout = 20 * time.Second
	// guestTimeout bounds what the guest takes to complete a connection.
	guestTimeout = 10 * time.Second
	// lingerTime bounds what the guest takes for the rest, once both sides have ended. It
	// may be a MiB, and the guest slow; meanwhile it counts as a connection.
	lingerTime = 10 * time.Minute
	// deadTime ends a connection whose guest acknowledges nothing at all.
	deadTime = 30 * time.Second
	// timeWait is how long an ended connection answers late packets. They come from the
	// queue of a socket and not over a network.
	timeWait = 100 * time.Millisecond
	// flowIdle ends a UDP flow. Shorter than that of most routers on the way.
	flowIdle = 60 * time.Second
	pingWait = 5 * time.Second
)

// The buffers of a TCP connection in the stack, for each direction. A connection alone
// needs bufferMost for its throughput; their sum must not grow with their number.
const (
	bufferMost  = 1 << 20
	bufferLeast = 4 << 10
	bufferAlone = 2 // connections that have bufferMost
	// A connection that is made while more than manyConnections are open gets a window of
	// bufferLeast from its first packet on.
	manyConnections = 64
	// synWindow is the window of the others' first packet; it is 16 bits wide.
	synWindow = 64<<10 - 1
	// kernelBuffer is that of a socket of the host while more than manyConnections are open;
	// the kernel's own would grow to several MiB.
	kernelBuffer = 64 << 10
	// datagrams is what waits in one UDP flow, in bytes; one of any size always does.
	datagrams = 16 << 10
)

// bufferSize is the buffer of the count'th connection. It falls with the square: 1,024
// connections have 8 MiB together. The guest is near, so that 64 KiB are enough for a
// hundred MB/s.
func bufferSize(count int) int {
	if count <= bufferAlone {
		return bufferMost
	}
	return max(bufferMost*bufferAlone*bufferAlone/(count*count), bufferLeast)
}

// copySize is what a connection copies at a time, in bytes. 1,024 connections have 5 MiB
// together, for each direction.
func copySize(count int) int {
	switch {
	case count <= 4:
		return 64 << 10
	case count <= manyConnections:
		return 16 << 10
	}
	return bufferLeast
}
