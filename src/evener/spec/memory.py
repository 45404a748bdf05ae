"""Memory per device, computed in one place for planner and runtime alike. No torch."""

from msgspec import Struct

from evener.errors import InvalidPlan
from evener.spec.cluster import Cluster, Device
from evener.spec.model import DTYPE_BYTES, QUANT_GROUP, ModelSpec, ffn_group, kv_token_bytes, whole_group
from evener.spec.plan import Replica, Shard, Stage, size
from evener.units import Bytes, human_bytes

BLOCK_TOKENS = 16
"""Tokens per KV block."""


class MemoryConfig(Struct, frozen=True):
    """What decides how many bytes a shard needs."""

    dtype: str = "fp32"
    kv_dtype: str = "fp32"
    max_batch_tokens: int = 2048
    block_tokens: int = BLOCK_TOKENS


def matrix_bytes(n: int, k: int, dtype: str, group: int = QUANT_GROUP) -> Bytes:
    """Bytes of a weight of n outputs and k inputs. In int8 every group of inputs of every output has four bytes more:
    its scale."""
    if dtype == "int8":
        return Bytes(n * -(-k // group) * (group + 4))
    return Bytes(n * k * DTYPE_BYTES[dtype])


def weight_bytes(shard: Shard, stage: Stage, model: ModelSpec, dtype: str) -> Bytes:
    """Bytes of weights that a shard holds: matrices in `dtype`, norms and biases in fp32. A tied embedding that covers
    the head rows counts once."""
    kv_a, kv_b = shard.kv_heads(model)
    q, kv, ffn = model.head_dim * size(shard.heads), model.head_dim * (kv_b - kv_a), size(shard.ffn)
    wide = whole_group(model.hidden)
    read_whole = matrix_bytes(q + 2 * kv + 2 * ffn, model.hidden, dtype, wide)
    down = matrix_bytes(model.hidden, ffn, dtype, ffn_group(model.ffn))
    layer = read_whole + matrix_bytes(model.hidden, q, dtype) + down
    norms = 2 * model.hidden + (2 * model.head_dim if model.qk_norm else 0)
    biases = model.head_dim * (size(shard.heads) + 2 * (kv_b - kv_a)) if model.qkv_bias else 0
    biases += model.hidden if model.o_bias else 0
    biases += 2 * size(shard.ffn) + model.hidden if model.mlp_bias else 0
    layers = size(stage.layers) * (layer + DTYPE_BYTES["fp32"] * (norms + biases))
    rows = size(shard.embed_rows) + size(shard.head_rows)
    if model.tied:
        lo, hi = max(shard.embed_rows[0], shard.head_rows[0]), min(shard.embed_rows[1], shard.head_rows[1])
        rows -= max(0, hi - lo)
    return Bytes(layers + matrix_bytes(rows, model.hidden, dtype, wide))


def block_bytes(shard: Shard, stage: Stage, model: ModelSpec, config: MemoryConfig) -> Bytes:
    """Bytes of one KV block on a shard: K and V, its layers, its KV heads."""
    kv_a, kv_b = shard.kv_heads(model)
    per_token = 2 * size(stage.layers) * (kv_b - kv_a) * kv_token_bytes(model.head_dim, config.kv_dtype)
    return Bytes(per_token * config.block_tokens)


def workspace_bytes(shard: Shard, model: ModelSpec, config: MemoryConfig) -> Bytes:
    """Activations of the largest batch, fp32: residual, normed, q, k, v, gate, up; and the logits rows."""
    kv_a, kv_b = shard.kv_heads(model)
    row = 4 * model.hidden + model.head_dim * (2 * size(shard.heads) + 2 * (kv_b - kv_a)) + 3 * size(shard.ffn)
    return Bytes(4 * (config.max_batch_tokens * row + 256 * size(shard.head_rows)))


def kv_limit(device: Device, kv_bytes: Bytes | None) -> Bytes | None:
    """What `kv_bytes` allows a device for KV; None: its declared memory alone decides."""
    return kv_bytes if device.memory is None or device.host == "localhost" else None


def shares_memory(device: Device) -> bool:
    """It declares no memory of its own: with others like it, it has that of this host."""
    return device.memory is None and device.host == "localhost"


def kv_blocks(
    replica: Replica, model: ModelSpec, cluster: Cluster, config: MemoryConfig, kv_bytes: Bytes | None = None
) -> int:
    """KV blocks a replica can hold: the fewest over its shards, because every stage needs every block.

    `kv_bytes` is the room for KV of each device of this host, and of any that declares no memory. Raises InvalidPlan
    with the shortage in bytes when weights and workspace alone exceed a device's declared memory.
    """
    fewest: int | None = None
    for s, stage in enumerate(replica.stages):
        for shard in stage.shards:
            per_block = block_bytes(shard, stage, model, config)
            device = cluster.device(shard.device)
            declared, room = device.memory, kv_limit(device, kv_bytes)
            if declared is not None:
                fixed = weight_bytes(shard, stage, model, config.dtype) + workspace_bytes(shard, model, config)
                left = declared - fixed
                if left < per_block:
                    raise InvalidPlan(
                        f"device {shard.device} (stage {s}) declares {human_bytes(declared)} but needs "
                        f"{human_bytes(fixed + per_block)} for weights, workspace and one KV block: "
                        f"{fixed + per_block - declared} bytes short; give it fewer layers or heads, or more memory"
                    )
                room = Bytes(left) if room is None else Bytes(min(left, room))
            if room is None or per_block == 0:
                continue
            fewest = min(fewest, room // per_block) if fewest is not None else room // per_block
    if fewest is None:
        raise InvalidPlan("no device declares memory and no KV size was given; pass --kv-cache-memory")
    return fewest
