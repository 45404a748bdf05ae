"""What a verdict is made of, and when a loss is large enough to be told."""

from msgspec import Struct

from evener.ledger.account import StageAccount, Use
from evener.ledger.causes import Cause
from evener.spec.model import ModelSpec
from evener.units import NS_PER_S

THRESHOLD = 0.05
"""Of the time with something to do; smaller losses are not told."""
TOLD_UNATTRIBUTED = 0.01
TOLD_SHORT = 0.02
"""Of the time up."""
ROOM = 0.1
"""Idle shares below are no room."""
MOST_ROOM = 1000.0
"""Times the traffic; of more, too little was seen to say."""
UNEVEN = 0.5
"""Batches whose standard deviation is this part of their mean fill a pipeline badly."""
LATER = 1.05
"""Ranks and stages within this ratio take equally long."""


class Hints(Struct, frozen=True):
    """What the ledger cannot know."""

    kv_bytes_per_token: int | None = None
    """Over all layers and heads, to say memory in bytes."""
    max_num_seqs: int | None = None
    """Sequences that hold KV, per replica: no more can be let in at a time."""


def hints_of(model: ModelSpec, kv_dtype: str, max_num_seqs: int) -> Hints:
    """Of a deployment of this model."""
    return Hints(kv_bytes_per_token=model.kv_bytes_per_token(kv_dtype), max_num_seqs=max_num_seqs)


class Finding(Struct, frozen=True, kw_only=True):
    """One loss."""

    cause: str
    """Label of the cause."""
    where: str
    """`cpu:1`, `stage 1 of replica 0`, `replica 0`."""
    share: float
    """Of the time in which the devices there had something to do."""
    lost_s: float
    """Device-seconds."""
    evidence: str
    remedy: str

    @property
    def text(self) -> str:
        """`stage 1 of replica 0 loses 31% (bubble): ...`."""
        return f"{self.where} loses {self.share:.0%} ({self.cause}): {self.evidence}. Remedy: {self.remedy}."


def asked(use: Use) -> float:
    """Device-seconds in which there was something to do. Exactly 0 where there was nothing: seconds as floats do not
    cancel out."""
    return (use.wall_ns - use.causes_ns[Cause.NO_DEMAND] - use.causes_ns[Cause.DOWN]) / NS_PER_S


def busy_share(use: Use) -> float:
    """Something to do, of the time that the devices were up."""
    up = (use.wall_ns - use.causes_ns[Cause.DOWN]) / NS_PER_S
    return asked(use) / up if up > 0 else 0.0


def seconds_of(use: Use, *causes: Cause) -> float:
    """Device-seconds of these causes."""
    return sum(use.causes[c.label] for c in causes)


def share_of(use: Use, seconds: float) -> float:
    """Of the time in which there was something to do."""
    whole = asked(use)
    return seconds / whole if whole > 0 else 0.0


def replica_name(index: str) -> str:
    """As findings say it."""
    return f"replica {index}"


def stage_name(stage: StageAccount) -> str:
    """As findings say it."""
    return f"stage {stage.stage} of replica {stage.replica}"


def make_finding(cause: Cause, where: str, use: Use, lost_s: float, evidence: str, remedy: str) -> Finding:
    """A finding whose share is of the time with something to do."""
    share = share_of(use, lost_s)
    return Finding(cause=cause.label, where=where, share=share, lost_s=lost_s, evidence=evidence, remedy=remedy)
