"""Memory per device, against sums done by hand."""

import pytest
from msgspec import structs

from evener.errors import InvalidPlan
from evener.spec.cluster import Cluster, parse_device
from evener.spec.memory import MemoryConfig, block_bytes, kv_blocks, weight_bytes, workspace_bytes
from evener.spec.model import ModelSpec, ffn_group, whole_group
from evener.spec.plan import Replica, Shard, Stage
from evener.units import Bytes

TINY = ModelSpec("llama", vocab=100, hidden=8, layers=3, heads=4, kv_heads=2, head_dim=2, ffn=10, max_position=64)
WHOLE = Shard("cpu:0", (0, 4), (0, 10), (0, 100), (0, 100))
STAGE = Stage((0, 3), (WHOLE,))


def test_weights_by_hand() -> None:
    q_and_o, k_and_v, mlp, norms = 2 * 8 * 8, 2 * 8 * 4, 3 * 8 * 10, 2 * 8
    matrices = 3 * (q_and_o + k_and_v + mlp) + 2 * 100 * 8
    assert weight_bytes(WHOLE, STAGE, TINY, "fp32") == 4 * (matrices + 3 * norms)
    assert weight_bytes(WHOLE, STAGE, TINY, "bf16") == 2 * matrices + 4 * 3 * norms, "norms stay fp32"


def test_int8_weights_are_whole_groups_with_their_scales() -> None:
    wide = structs.replace(TINY, hidden=384, head_dim=64, ffn=130)
    q, kv, ffn, split, whole = 4 * 64, 2 * 64, 130, 64 + 4, 192 + 4
    layer = (q + 2 * kv + 2 * ffn) * 2 * whole + 384 * (4 + 3) * split  # rows, groups of their inputs, bytes of a group
    shard = structs.replace(WHOLE, ffn=(0, 130))
    assert weight_bytes(shard, STAGE, wide, "int8") == 3 * (layer + 4 * 2 * 384) + 2 * 100 * 2 * whole


def test_cuts_of_the_ffn_fall_on_groups_that_leave_enough_to_deal_out() -> None:
    assert [ffn_group(n) for n in (10, 64, 1024, 1536, 4864, 8960, 14_336)] == [64, 64, 64, 128, 128, 128, 128]
    model = structs.replace(TINY, ffn=1536)
    assert [structs.replace(model, quant_group=g).ffn_unit for g in (1, 64)] == [1, 128]


def test_inputs_that_no_rank_splits_share_a_scale_in_wider_groups() -> None:
    assert [whole_group(n) for n in (8, 64, 100, 320)] == [64] * 4, "nothing wider divides them"
    assert [whole_group(n) for n in (128, 576, 896, 2048)] == [128, 192, 128, 128]


def test_kv_blocks_by_dtype() -> None:
    values = 2 * 3 * 2 * 2 * 16  # K and V, layers, KV heads, head_dim, tokens
    sizes = [block_bytes(WHOLE, STAGE, TINY, MemoryConfig(kv_dtype=t)) for t in ("fp32", "bf16", "int8")]
    assert sizes == [4 * values, 2 * values, values + 4 * values // 2], "int8: a scale per token and head"
    assert [TINY.kv_bytes_per_token(t) * 16 for t in ("fp32", "bf16", "int8")] == sizes


def test_tied_rows_count_once_where_they_overlap() -> None:
    tied = structs.replace(TINY, tied=True)
    both = weight_bytes(WHOLE, STAGE, tied, "bf16")
    assert both == weight_bytes(WHOLE, STAGE, TINY, "bf16") - 2 * 100 * 8
    part = structs.replace(WHOLE, head_rows=(60, 90))
    assert weight_bytes(part, STAGE, tied, "bf16") == both, "rows 60 to 90 are held by the embedding already"


def test_biases_and_head_norms_count() -> None:
    plain = weight_bytes(WHOLE, STAGE, TINY, "int8")
    assert weight_bytes(WHOLE, STAGE, structs.replace(TINY, qkv_bias=True), "int8") == plain + 4 * 3 * (8 + 4 + 4)
    assert weight_bytes(WHOLE, STAGE, structs.replace(TINY, o_bias=True), "int8") == plain + 4 * 3 * 8
    assert weight_bytes(WHOLE, STAGE, structs.replace(TINY, mlp_bias=True), "int8") == plain + 4 * 3 * (10 + 10 + 8)
    assert weight_bytes(WHOLE, STAGE, structs.replace(TINY, qk_norm=True), "int8") == plain + 4 * 3 * 2 * 2


def test_a_shard_holds_the_kv_heads_its_queries_read() -> None:
    config = MemoryConfig()
    per_kv_head = 2 * 3 * 2 * 4 * config.block_tokens  # K and V, layers, head_dim, fp32
    blocks = [
        block_bytes(structs.replace(WHOLE, heads=h), STAGE, TINY, config) for h in ((0, 4), (0, 3), (0, 2), (2, 2))
    ]
    assert blocks == [2 * per_kv_head, 2 * per_kv_head, per_kv_head, 0]


def test_blocks_are_the_fewest_over_the_shards() -> None:
    left, right = Shard("cpu:0", (0, 2), (0, 10)), Shard("cpu:1,", (2, 4), (10, 10))
    right = structs.replace(right, device="cpu:1")
    stage = Stage((0, 3), (left, right))
    config = MemoryConfig(max_batch_tokens=4)
    need = weight_bytes(left, stage, TINY, "fp32") + workspace_bytes(left, TINY, config)
    block = block_bytes(left, stage, TINY, config)
    cluster = Cluster((parse_device(f"cpu:0,memory={need + 7 * block + 1}"), parse_device("cpu:1")))
    assert kv_blocks(Replica((stage,)), TINY, cluster, config, Bytes(100 * block)) == 7
    assert kv_blocks(Replica((stage,)), TINY, cluster, config, Bytes(5 * block)) == 5
    short = Cluster((parse_device(f"cpu:0,memory={need + block - 3}"), parse_device("cpu:1")))
    with pytest.raises(InvalidPlan, match=r"device cpu:0 \(stage 0\).*3 bytes short; give it fewer layers"):
        kv_blocks(Replica((stage,)), TINY, short, config, Bytes(100 * block))


def test_what_this_host_has_free_is_no_limit_for_devices_elsewhere() -> None:
    shard = structs.replace(WHOLE, device="far/cuda:0")
    config = MemoryConfig(max_batch_tokens=4)
    stage = Stage((0, 3), (shard,))
    need = weight_bytes(shard, stage, TINY, "fp32") + workspace_bytes(shard, TINY, config)
    block = block_bytes(shard, stage, TINY, config)
    far = structs.replace(parse_device("cuda:0"), name="far/cuda:0", host="far", memory=Bytes(need + 9 * block))
    assert kv_blocks(Replica((stage,)), TINY, Cluster((far,)), config, Bytes(2 * block)) == 9


def test_no_memory_stated_anywhere_is_refused() -> None:
    cluster = Cluster((parse_device("cpu:0"),))
    with pytest.raises(InvalidPlan, match="--kv-cache-memory"):
        kv_blocks(Replica((STAGE,)), TINY, cluster, MemoryConfig())
