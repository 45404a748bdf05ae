"""A declared slow-down, so that real ranks behave as unlike hardware on any machine.

A device owes `(slowdown - 1)` times the CPU time of its thread, and lets it pass before the next operation that others
can see: groups and pipes pay on entry (`ShmGroup`, `ShmPipe`), the runner at the end of a batch. A rank that has its
core to itself keeps it meanwhile; one that shares it sleeps. What it waited for its core counts as paid: the device
that it stands for would have had its own. An operation of a slowed rank may thus begin with a pause, which an abort
does not end before its time.
"""

from evener.execute.live.transport import _shm

Pace = _shm.Pace
"""`Pace(slowdown, threads=1, sleeps=True)`: `pay`, `skip` what is no work of the device's own, `idled`. Times in ns."""
