"""Whole layers with their sums in native code: the same bits and stamps as one by one, the same end of a lost peer."""

import time
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from ranks import in_threads, names, with_group

from evener.errors import WorkerLost
from evener.execute.live.transport.base import Stamp
from evener.execute.live.transport.layout import GroupSpec, SegmentLayout
from evener.execute.live.transport.pace import Pace
from evener.execute.live.transport.shm import Segment, ShmGroup
from evener.kernels import Layers, LayerShape, PackedWeight, pack_weight
from evener.units import Seconds

HIDDEN, DIM, FFN, COUNT, ROWS = 48, 16, 32, 3, 5
SHAPE = LayerShape(HIDDEN, n_q=2, n_kv=1, head_dim=DIM, ffn=FFN, eps=1e-5, scale=0.25)


class Parts(NamedTuple):
    attn_norm_H: torch.Tensor
    qkv_CH: PackedWeight
    o_HQ: PackedWeight
    mlp_norm_H: torch.Tensor
    gate_up_FH: PackedWeight
    down_HF: PackedWeight
    qkv_bias_C: torch.Tensor | None = None
    q_norm_D: torch.Tensor | None = None
    k_norm_D: torch.Tensor | None = None
    o_bias_H: torch.Tensor | None = None
    gate_up_bias_F: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None


class Batch(NamedTuple):
    positions_T: torch.Tensor
    cu_R: torch.Tensor
    start_R: torch.Tensor
    tables_RM: torch.Tensor
    kv_slot_T: torch.Tensor
    n_rows: int = ROWS
    n_real: int = ROWS


def make_layers(rank: int) -> Layers:
    draw = torch.Generator().manual_seed(rank)

    def weight(n: int, k: int) -> PackedWeight:
        return pack_weight(torch.randn(n, k, generator=draw) / k**0.5)

    ones = torch.ones(HIDDEN)
    parts = [
        Parts(
            ones, weight(4 * DIM, HIDDEN), weight(HIDDEN, 2 * DIM), ones, weight(2 * FFN, HIDDEN), weight(HIDDEN, FFN)
        )
        for _ in range(COUNT)
    ]
    k, v = torch.zeros(COUNT, 1, 2, DIM, 16), torch.zeros(COUNT, 1, 2, 16, DIM)
    angle = torch.outer(torch.arange(16.0), torch.arange(1, DIM // 2 + 1) / 10.0)
    return Layers(SHAPE, parts, k, v, angle.cos(), angle.sin(), torch.zeros(2, dtype=torch.int32))


def make_batch() -> Batch:
    n = torch.arange(ROWS, dtype=torch.int32)
    ends, zero = torch.tensor([0, ROWS], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return Batch(n, ends, zero, zero.unsqueeze(0), n.clone())


X = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(9))


def test_layers_with_their_sums_are_the_sums_one_by_one() -> None:
    def at_once(group: ShmGroup) -> tuple[torch.Tensor, list[Stamp]]:
        x, layers = X.clone(), make_layers(group.rank)
        return x, group.run_layers(layers, layers.batch(make_batch()), x)

    def one_by_one(group: ShmGroup) -> torch.Tensor:
        x, layers = X.clone(), make_layers(group.rank)
        batch, attn, mlp = layers.batch(make_batch()), torch.empty_like(X), torch.empty_like(X)
        for i in range(COUNT):
            layers.attention(i, batch, x, mlp if i else None, attn)
            group.all_reduce(attn)
            layers.mlp(i, batch, x, attn, mlp)
            group.all_reduce(mlp)
        return x + mlp

    for ranks in (2, 3):
        spec = GroupSpec(names(ranks))
        expected = with_group(spec, one_by_one)
        for (x, stamps), want in zip(with_group(spec, at_once), expected, strict=True):
            assert torch.equal(x, want) and torch.equal(x, expected[0])
            assert len(stamps) == 2 * COUNT
            times = [t for s in stamps for t in (s.entered, s.arrived, s.ended)]
            assert all(s.entered <= s.arrived <= s.ended for s in stamps) and times[::3] == sorted(times[::3])


def test_a_declared_link_delays_every_sum() -> None:
    delay = 0.002

    def body(group: ShmGroup) -> list[Stamp]:
        layers = make_layers(group.rank)
        return group.run_layers(layers, layers.batch(make_batch()), X.clone())

    for stamps in with_group(GroupSpec(names(2), delay=Seconds(delay)), body):
        assert all(s.ended - s.arrived >= delay * 1e9 for s in stamps)


def test_a_slow_rank_pays_before_every_sum() -> None:
    """What it owes for a half is slept before that half's sum, where its peer sees it as computing."""
    layout = SegmentLayout.plan([GroupSpec(names(2))])
    segment = Segment.create(layout)

    def body(rank: int) -> tuple[torch.Tensor, list[Stamp], Pace | None]:
        layers, x = make_layers(rank), X.clone()
        batch = layers.batch(make_batch())
        pace = Pace(200.0) if rank == 1 else None  # these layers are small: every half owes far more than it takes
        group = ShmGroup(segment, layout.groups[0], rank, pace=pace)
        if pace is not None:
            pace.idled(time.monotonic_ns(), time.thread_time_ns())
        return x, group.run_layers(layers, batch, x), pace

    (x, fast, _), (same, slow, pace) = in_threads(2, body)
    segment.close()
    assert torch.equal(x, same)
    assert pace is not None
    between = [after.cpu_entered - before.cpu_ended for before, after in pairwise(slow)]
    gaps = [after.entered - before.ended for before, after in pairwise(slow)]
    # What the first sleep lasted too long is the only other thing that can have paid for the halves after it.
    assert sum(gaps) >= 200 * (sum(between) - pace.spent_ns) - pace.waited_ns
    assert sum(s.arrived - s.entered for s in slow) < sum(s.arrived - s.entered for s in fast)


def test_a_lost_peer_ends_the_layers() -> None:
    layout = SegmentLayout.plan([GroupSpec(names(2))])
    segment = Segment.create(layout)

    def body(rank: int) -> str:
        if rank == 1:
            ShmGroup(segment, layout.groups[0], 1).all_reduce(torch.zeros(ROWS, HIDDEN))  # the first sum, and no more
            segment.abort("cpu:1", "exited with signal 9")
            return ""
        group, layers = ShmGroup(segment, layout.groups[0], 0), make_layers(0)
        with pytest.raises(WorkerLost) as e:
            group.run_layers(layers, layers.batch(make_batch()), X.clone())
        return e.value.reason

    assert in_threads(2, body)[0] == "exited with signal 9"
    segment.close()


def test_ranks_that_meet_in_different_operations_are_told() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 1:
            with pytest.raises((RuntimeError, WorkerLost)):
                group.all_reduce(torch.zeros(7))
            return
        layers = make_layers(0)
        with pytest.raises(RuntimeError, match="different collectives"):
            group.run_layers(layers, layers.batch(make_batch()), X.clone())

    with_group(GroupSpec(names(2)), body)
