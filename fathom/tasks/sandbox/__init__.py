"""Runs programs that nobody has read, model-written ones above all, and returns what they gave.

    with Sandbox(Limits(), workers=2) as sandbox:
        outcome = sandbox.run(Calls("def double(x):\\n    return 2 * x", "double", [(3,), (4,)]))
        outcome.outputs    # (6, 8)

How it is built, from the outside in:

* `pool`: the `Sandbox`, a few workers that threads share; one that is in doubt is replaced;
* `worker`: one worker as the trusted side sees it: pipes in, pipes out, a deadline;
* `launch`: the command line that starts one, with bubblewrap or without;
* `inside/server`: what a worker runs: started once, it forks a child per execution, so that neither bubblewrap nor
  Python starts anew (1 ms instead of some 40);
* `inside/confine`: what the child gives up before it runs a line of the program;
* `inside/program`: runs the program, and sends home what it returned as plain data (`inside/plain`).

**What a program can reach.** bubblewrap gives the worker a file system of its own, in which there are only the
system's `/usr` and libraries and Python's standard library, read-only: no home, no `/etc`, no `/proc`, no `/sys`, no
installed packages, no file of ours but the folder `inside`. There is no network, no terminal, no environment, no file
descriptor but its own pipes, and no capability. Every execution has a process, ipc and mount namespace of its own, so
that it sees no process but itself and its `/tmp` is new, bounded and gone with it. A system call filter refuses
new processes and threads, sockets, and memory that no limit counts (memfd, System V and POSIX shared memory). So one
execution is one thread, and all its memory is `memory_mb` + `files_mb` + what its pipes hold, for which the kernel
has a limit of its own (64 MiB for all pipes of a user, as systems come).
The program cannot name, signal, trace or limit the server, which is in another process namespace, and holds none of
its descriptors.

**What a program can know.** Its own text and the inputs. What is expected never enters: the trusted side compares. So
there is nothing to read, patch or fake; whatever is written to the result's pipe is read as the program's own claim,
strictly and bounded.

**What is not contained.** The kernel's system calls are those of the host, filtered by a list of refusals: a hole in
the kernel is a hole in the sandbox. The kernel's own book-keeping for a program (page tables, file locks, timers) is
bounded by its processor time alone. A program can slow its neighbours while it runs, and can read what `/usr` and
Python's own folder hold, and the names of the folders above that one. With `kind="none"` the limits and the filter
hold on Linux, and the limits alone elsewhere (there a program can start others, which are killed with its process
group); files and the network are open to it, so that it protects from accidents alone.
"""

from fathom.tasks.sandbox.check import Calls, Check, Outcome, Runs, Status
from fathom.tasks.sandbox.limits import Limits
from fathom.tasks.sandbox.pool import Kind, Sandbox

__all__ = ["Calls", "Check", "Kind", "Limits", "Outcome", "Runs", "Sandbox", "Status"]
