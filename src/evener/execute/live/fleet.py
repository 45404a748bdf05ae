"""Which worker processes a plan needs, what each is told, and the memory that those of one replica share."""

import os
from collections.abc import Iterator

from msgspec import Struct

from evener.brain import BrainConfig
from evener.execute.live.topology import layout_of
from evener.execute.live.transport.segment import Segment
from evener.execute.live.wire import WorkerConfig
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.units import Seconds


class LiveConfig(Struct, frozen=True):
    """Everything the live body needs besides the model, the plan and the costs."""

    model_path: str
    dtype: str = "fp32"
    kv_dtype: str = "fp32"
    max_model_len: int = 2048
    max_top_logprobs: int = 20
    start_timeout: Seconds = Seconds(120.0)
    wait_deadline: Seconds = Seconds(60.0)
    """A worker that keeps its peers or the control process waiting longer than this counts as hung."""
    record: str | None = None
    """File that receives every event, command and span, for replay."""
    ledger: bool = True
    """Account for every device-second."""
    trace_segments: bool = False
    """Keep every stretch of every span, for traces."""


def make_segments(plan: Plan, cluster: Cluster, hidden: int, max_batch_tokens: int) -> list[Segment | None]:
    """One segment per replica of several workers."""
    return [
        Segment.create(layout_of(replica, cluster.links, hidden, max_batch_tokens))
        if len(replica.devices()) > 1
        else None
        for replica in plan.replicas
    ]


def worker_configs(
    model: ModelSpec,
    plan: Plan,
    cluster: Cluster,
    kv_blocks: list[int],
    brain: BrainConfig,
    config: LiveConfig,
    segments: list[Segment | None],
    endpoint: str,
) -> Iterator[WorkerConfig]:
    """One per shard of the plan, replica by replica."""
    for r, replica in enumerate(plan.replicas):
        segment = segments[r]
        for s, stage in enumerate(replica.stages):
            for rank, shard in enumerate(stage.shards):
                yield WorkerConfig(
                    model=config.model_path,
                    spec=model,
                    replica=replica,
                    replica_index=r,
                    stage=s,
                    rank=rank,
                    device=cluster.device(shard.device),
                    devices=tuple(cluster.device(d) for d in replica.devices()),
                    links=cluster.links,
                    epoch=plan.epoch,
                    dtype=config.dtype,
                    kv_dtype=config.kv_dtype,
                    kv_blocks=kv_blocks[r],
                    block_tokens=brain.block_tokens,
                    max_num_seqs=brain.max_num_seqs,
                    max_model_len=config.max_model_len,
                    max_batch_tokens=brain.max_num_batched_tokens + brain.max_num_seqs,
                    control_pid=os.getpid(),
                    endpoint=endpoint,
                    segment_fd=segment.fd if segment is not None else -1,
                    shares_core=_shares_core(plan, cluster, shard.device),
                    wait_deadline_s=config.wait_deadline,
                    ledger=config.ledger,
                    trace_segments=config.trace_segments,
                )


def _shares_core(plan: Plan, cluster: Cluster, device: str) -> bool:
    own = set(cluster.device(device).cores)
    return any(own & set(cluster.device(d).cores) for d in plan.devices() if d != device)
