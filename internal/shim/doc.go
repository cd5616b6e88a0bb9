// Package shim keeps one VM alive without the daemon. It has two halves: the
// supervisor that the program banger-shim is (Main), one per VM, and the calls by
// which a daemon starts it and reads what it left (Launch, Held, Processes,
// ReadExit). They share nothing but files below the VM's directory, an OFD lock
// and, during the start, a pipe. To ask whether a VM runs, ask Held and nothing
// else: no pid and no file says it. A VM is tied to its shim in one of two ways: by the
// lock and a signal, where the daemon is a user's, or, with Config.Group, by a PID
// namespace and a control group, where it is root and the VMM is jailed.
//
// # The lock
//
// run/lock carries an OFD lock (fcntl(2), F_OFD_SETLK): it belongs to an open file
// description, not to a process, so it is inherited by fork and exec and is free
// when the last descriptor is closed. Launch takes it, the shim inherits it as
// descriptor 3, and the VMM, unless it has a group, inherits it from the shim, also as
// descriptor 3 and without close-on-exec. The daemon closes its own descriptor and never
// unlocks: an unlock would free it for all. Whoever asks uses F_OFD_GETLK, which takes
// nothing; a probe that locks would make others see a free lock as held.
//
// # Order
//
//	daemon  1  open and lock run/lock
//	        2  remove run/processes.json and log/exit.json of the run before
//	        3  write run/shim.json (temp file, rename)
//	        4  fork and exec banger-shim: own session, cwd DIR, /dev/null as 0 1 2,
//	           the lock as 3, the report pipe as 4, nothing else; with a group: own PID
//	           namespace, the pipe that it waits on as 5
//	       (4a with a group: place the shim, which makes the group; write a byte to it)
//	        5  close the lock, read the report and then run/processes.json
//	shim    6  lock its thread, check that 3 is the lock, close what it should not have
//	       (6a with a group: read the byte; at the end of the pipe, end)
//	        7  write run/processes.json with itself alone
//	        8  open the program of the network, fork and exec it as below, without the lock
//	        9  fork and exec the VMM with Pdeathsig SIGKILL; with a group: into it
//	       10  write run/processes.json with both too; if it cannot, kill both
//	       11  report, close the pipe
//	       12  wait for the VMM, drain all output, restart the network when it ends
//	       13  kill and reap the network
//	       14  write log/exit.json (temp file, fsync, rename), exit
//
// A daemon that is killed at any of these instructions leaves either nothing held
// or a supervised VMM. Up to 4 the lock is only in the daemon and goes with it; in
// the fork it is in a child that shares nothing with the daemon's fate and has
// only exec before it; from 5 on the shim does not care whether anybody reads its
// report. The configuration is written under the lock, so a Launch that finds a
// VM running cannot change what that VM's shim may yet read; and it is written
// before the fork, so the shim needs no daemon to read it. A shim that is killed
// takes the VMM with it: the signal of Pdeathsig comes when the *thread* that
// forked ends, so Main stays on one thread from its first instruction (and the VMM
// must not change its credentials, which would drop the request: see
// PR_SET_PDEATHSIG(2const)). Between fork and that request the child looks whether
// its parent is still there.
//
// The lock is held from 1 on, so it covers every window: daemon dead between fork
// and exec, shim started and VMM not yet, exit.json not written yet. Hence
// "held" with no processes.json, or with one that names no VMM, means "wait a
// little", "free" means that exit.json is as complete as it will ever be, and
// killing the shim always kills the VM and its network. To be rid of a VM, kill the VMM, so that the
// shim can tell of its end, and the shim only if the lock is not free soon.
//
// # The namespace and the group
//
// A jailer drops Pdeathsig with its credentials and closes what it was given, so neither
// the signal nor the lock follows such a VMM. With a group the shim is the first process
// of a PID namespace instead: the kernel kills all in it when the shim ends, however it
// ends, and gives it the orphans to reap. /proc stays the host's, so all pids in files
// are the host's; those that the shim signals and waits for are its namespace's.
//
// The kernel frees the descriptors of the first process, and with them the lock, before
// it kills the others, and a large VMM needs a while to give its memory back. So a VM is
// gone when the lock is free and the scope, the group above Config.Group, says
// "populated 0": Held asks both, and Launch refuses before. A group that is not there is
// empty. The shim is in the scope too, in another leaf, where the limits of the VMM's
// do not end it: it alone sees whether the kernel ended the VMM for want of memory,
// because the groups go away with the last process.
//
// Until the shim is placed it has started nothing: a daemon that dies at 4a leaves a shim
// that reads the end of the pipe, says so in exit.json, and ends.
//
// # The network
//
// A VM may have a second process, banger-net (Config.Network). It has no part in
// "held": it may crash at any time, and is started again from the file that the shim
// holds open, at once or after a pause that grows to a second, for ever. Only a first
// exec that fails makes the start fail. It too is forked by the first thread with
// Pdeathsig, so its restarts are in the loop that waits for the VMM; signals to the
// shim are not for it.
//
// # Who keeps what
//
//	promise                      daemon dead        disk full               versions differ
//	the VM runs on               shim               shim: output is         shim: it is the release
//	                                                drained and dropped     that started the VM
//	held ⇔ the VM runs           kernel             kernel                  kernel: one lock file,
//	                                                                        one kind of lock; the
//	                                                                        group is in shim.json
//	no VM without supervisor     kernel (Pdeathsig, the VM does not start   kernel
//	                             or namespace)
//	its processes can be named   processes.json     written before the      fields are only added,
//	                                                start is reported       Version says the least
//	its end is known             exit.json          not kept: the daemon    as above
//	                                                sees a free lock and
//	                                                no exit.json
//	the network is there         shim: restarts it  shim: processes.json    shim: the program of the
//	                                                is late                 release that started it
//	its console is kept          shim               the older part is       raw bytes
//	                                                kept, the rest lost
//	the guest's intent is known  exit.json          as "its end"            wire.IntentPrefix
//
// Everything a shim uses is in the standard library and as little of it as will
// do, because there is one per VM: its resident set is tested to stay below 4 MiB.
package shim
