"""The closed list of causes: every device-second has exactly one, and a device's causes sum to its wall time.

Precedence among the causes of idle time, first match: `down`; once a batch is issued, `contended` (positive kernel
evidence), else `host`; before that `kv_starved` and `held` (the brain said so), `bubble` (the batch before is still at
another stage; at a slower peer of the last stage: `straggler`), `host` (requests are unfinished here and nothing was
handed over), `imbalance`, `no_demand`. `ledger/replica.py` does it.
"""

from enum import IntEnum


class Cause(IntEnum):
    """Where a device-second went. The value is the index into an account."""

    PREFILL = 0
    """Useful: prompt tokens computed for the first time."""
    DECODE = 1
    """Useful: one new token per row."""
    PADDING = 2
    """Computed and thrown away (static batches)."""
    RECOMPUTE = 3
    """Tokens computed once more after a preemption or a lost worker."""
    SPECULATION = 4
    """Rows whose end was known too late, rejected drafts."""
    TRANSFER = 5
    """Moving data after all ranks had arrived."""
    STRAGGLER = 6
    """Waiting in a collective for a slower peer."""
    BUBBLE = 7
    """The stage is idle while its replica has work elsewhere in the pipe."""
    HOST = 8
    """Work was ready and not handed over."""
    CONTENDED = 9
    """Descheduled: waiting for a core, or the hypervisor ran somebody else."""
    KV_STARVED = 10
    """Requests wait for KV blocks."""
    IMBALANCE = 11
    """Idle here while requests queue at another replica."""
    HELD = 12
    """The policy waits, for a reason it names."""
    MIGRATION = 13
    """Moving KV or weights between devices."""
    NO_DEMAND = 14
    """Nothing to do."""
    DOWN = 15
    """Loading, failed, or replanning."""
    UNATTRIBUTED = 16
    """What no evidence explains: an independent residual, never a default."""

    @property
    def label(self) -> str:
        """`kv_starved`."""
        return self.name.lower()


N_CAUSES = len(Cause)
USEFUL = (Cause.PREFILL, Cause.DECODE)
COMPUTE = (Cause.PREFILL, Cause.DECODE, Cause.PADDING, Cause.RECOMPUTE, Cause.SPECULATION)
"""Seconds in which the device computed, useful or not."""
