"""How much work a batch is: operations and bytes of each shard, whatever the time they take. Pure.

The ledger sets this beside the measured seconds: a second of compute is useful, but useful is not the same as fast.
What is counted is the least that must be done. Operations are those of the matrix products, one multiplication and
addition being two. Bytes are those that must come from memory or go there: the weights once per batch, the keys and
values that attention reads and writes, the rows of the embedding. Activations may stay in caches and are not counted.
"""

from typing import NamedTuple

from evener.cost.base import BatchShape
from evener.cost.rates import Profile
from evener.errors import InvalidInput
from evener.spec.model import DTYPE_BYTES, ModelSpec
from evener.spec.plan import Plan, Shard, Stage, size


class _Per(NamedTuple):
    """What one shard does, over all its layers."""

    row_flop: int
    """Per row: projections and FFN."""
    pair_flop: int
    """Per (query, key) pair of attention."""
    sampled_flop: int
    """Per sampled row: the head."""
    weight_bytes: int
    """Once per batch: projections and FFN."""
    head_bytes: int
    """Once per batch that samples."""
    key_bytes: int
    """K and V of one token."""
    embed_bytes: int
    """Per row: reading its part of the embedding. On average, where the vocabulary is split."""


class PlanWork:
    """Operations and bytes of the shards of one plan, and the peak rates of its devices.

    Immutable; each answer is a few multiplications. Raises InvalidInput for an unknown dtype or one that the profile
    has no rate for, InvalidDevice when the profile lacks a device of the plan.
    """

    def __init__(
        self, model: ModelSpec, plan: Plan, profile: Profile, dtype: str = "fp32", kv_dtype: str = "fp32"
    ) -> None:
        for what, given in (("dtype", dtype), ("kv_dtype", kv_dtype)):
            if given not in DTYPE_BYTES:
                raise InvalidInput(f"{what}={given!r} is not one of {', '.join(DTYPE_BYTES)}")
        self._per = [
            [[_shard(model, stage, shard, dtype, kv_dtype) for shard in stage.shards] for stage in replica.stages]
            for replica in plan.replicas
        ]
        self._peaks = {name: _peak(profile, name, dtype) for name in plan.devices()}

    def of(self, replica: int, stage: int, rank: int, shape: BatchShape) -> tuple[int, int]:
        """(flop, bytes) of one batch on one shard. Rows that are thrown away count: they are computed.

        Prefill reads the keys of a chunk once per chunk. Their number is exact for a batch of one chunk; several are
        taken to be alike.
        """
        per = self._per[replica][stage][rank]
        prefill, sampled = shape.prefill_tokens, shape.sampled_rows
        rows = prefill + shape.decode_rows + shape.pad_tokens
        pairs = shape.prefill_pairs + shape.decode_context
        flop = rows * per.row_flop + pairs * per.pair_flop + sampled * per.sampled_flop
        keys = prefill + shape.decode_rows + shape.decode_context  # the own keys written, the context's read
        if prefill:
            chunks = max(1, shape.chunks)
            # count * start + count * (count + 1) / 2 pairs, solved for start + count.
            keys += max(0, 2 * chunks * shape.prefill_pairs // prefill + prefill - chunks) // 2
        nbytes = keys * per.key_bytes + rows * per.embed_bytes
        if rows:
            nbytes += per.weight_bytes
        if sampled:
            nbytes += per.head_bytes
        return flop, nbytes

    def peak(self, device: str) -> tuple[float, float]:
        """(flop/s, bytes/s) of a device by itself at its best, after its declared slow-down: measured, or published."""
        return self._peaks[device]


def _shard(model: ModelSpec, stage: Stage, shard: Shard, dtype: str, kv_dtype: str) -> _Per:
    layers, heads, kv = size(stage.layers), size(shard.heads), size(shard.kv_heads(model))
    weights = model.hidden * (model.head_dim * (2 * heads + 2 * kv) + 3 * size(shard.ffn))
    head = model.hidden * size(shard.head_rows)
    width = DTYPE_BYTES[dtype]
    return _Per(
        row_flop=2 * layers * weights,
        pair_flop=4 * layers * heads * model.head_dim,
        sampled_flop=2 * head,
        weight_bytes=layers * weights * width,
        head_bytes=head * width,
        key_bytes=2 * layers * kv * model.head_dim * DTYPE_BYTES[kv_dtype],
        embed_bytes=model.hidden * size(shard.embed_rows) * width // model.vocab,
    )


def _peak(profile: Profile, name: str, dtype: str) -> tuple[float, float]:
    device = profile.device(name)
    rates = device.alone
    tables = [table for table in rates.gemm if table.dtype == dtype]
    if not tables:
        have = ", ".join(t.dtype for t in rates.gemm) or "none"
        raise InvalidInput(f"no GEMM rate for dtype {dtype!r} on {name} (measured: {have}); use one of these")
    if device.peaks is not None:
        published = device.peaks.flop_rate(dtype)
        assert published is not None, f"{name} has a rate for {dtype} and no peak"
        return published / device.slowdown, device.peaks.bandwidth / device.slowdown
    flops = max(rate for _, rate in tables[0].points)
    read = max(rates.read_bandwidth, *(a.bandwidth for a in rates.attention))
    return flops / device.slowdown, read / device.slowdown
