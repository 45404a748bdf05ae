"""Shared-memory collectives against torch's own sums, bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import names, with_group

from evener.execute.live.transport.layout import GroupSpec
from evener.execute.live.transport.shm import ShmGroup

SLOTS = st.sampled_from([4096, 8192, 65536])
# Around a slot's edge, beyond several of them, and past the size from which sums are scattered.
COUNTS = st.one_of(st.integers(0, 3000), st.integers(16_300, 16_500), st.integers(40_000, 60_000))


def inputs(ranks: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator) * 10 ** (r % 3) for r in range(ranks)]
    return [(x * 50).to(dtype) if not dtype.is_floating_point else x.to(dtype) for x in draw]


def rank_order_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for p in parts[1:]:
        total = total + p.float()
    return total.to(parts[0].dtype)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(1, 4), count=COUNTS, slot=SLOTS, seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), spin=st.sampled_from([0.0, 1e-4]),
)  # fmt: skip
def test_all_reduce_is_the_sum_in_rank_order_on_every_rank(
    ranks: int, count: int, slot: int, seed: int, dtype: torch.dtype, spin: float
) -> None:
    # Three in a row: the slots are used in turn, and the last must not see the first.
    rounds = [inputs(ranks, (count,), dtype, seed + i) for i in range(3)]

    def body(group: ShmGroup) -> list[torch.Tensor]:
        mine = [parts[group.rank].clone() for parts in rounds]
        for t in mine:
            group.all_reduce(t)
        return mine

    for got in with_group(GroupSpec(names(ranks), slot_bytes=slot), body, spin):
        for t, parts in zip(got, rounds, strict=True):
            assert torch.equal(t, rank_order_sum(parts))


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.integers(1, 4), rows=st.integers(0, 5), columns=st.sampled_from([1, 7, 64, 1001]), slot=SLOTS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_gather_and_exchange_move_any_dtype(
    ranks: int, rows: int, columns: int, slot: int, dtype: torch.dtype, seed: int
) -> None:
    parts = inputs(ranks, (ranks, rows, columns), dtype, seed)

    def body(group: ShmGroup) -> tuple[torch.Tensor, torch.Tensor]:
        t = parts[group.rank]
        gathered, exchanged = t.new_empty(ranks, *t.shape), torch.empty_like(t)
        group.all_gather(t, gathered)
        group.all_to_all(t, exchanged)
        return gathered, exchanged

    for rank, (gathered, exchanged) in enumerate(with_group(GroupSpec(names(ranks), slot_bytes=slot), body)):
        assert torch.equal(gathered, torch.stack(parts))
        assert torch.equal(exchanged, torch.stack([p[rank] for p in parts]))


def test_special_values_survive_the_sum() -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[inf, inf, nan, 3.38e38, -0.0, 1e-40], [1.0, -inf, 1.0, 3.38e38, -0.0, 1e-40]]
    for dtype in (torch.float32, torch.bfloat16):

        def body(group: ShmGroup, dtype: torch.dtype = dtype) -> torch.Tensor:
            t = torch.tensor(rows[group.rank]).to(dtype)
            group.all_reduce(t)
            return t

        want = rank_order_sum([torch.tensor(r).to(dtype) for r in rows])
        for got in with_group(GroupSpec(names(2)), body):
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), want.nan_to_num(7.0, 8.0, 9.0))
            assert torch.equal(torch.signbit(got[4:5]), torch.signbit(want[4:5]))


def test_more_ranks_than_cores_get_through() -> None:
    def body(group: ShmGroup) -> float:
        t = torch.ones(64)
        for _ in range(300):
            group.all_reduce(t)
            t.div_(group.size)
        return float(t.sum())

    assert with_group(GroupSpec(names(8)), body) == [64.0] * 8


def test_ranks_in_different_collectives_are_told_so() -> None:
    def body(group: ShmGroup) -> str:
        with pytest.raises(RuntimeError) as e:
            group.all_reduce(torch.zeros(10 + group.rank))
        return str(e.value)

    for message in with_group(GroupSpec(names(2)), body):
        assert "all_reduce of 40 bytes" in message and "all_reduce of 44 bytes" in message


def test_what_cannot_be_carried_is_refused() -> None:
    def body(group: ShmGroup) -> None:
        with pytest.raises(ValueError, match=r"float64; shared memory sums"):
            group.all_reduce(torch.zeros(2, dtype=torch.float64))
        with pytest.raises(ValueError, match="contiguous"):
            group.all_reduce(torch.zeros(4, 4).t()[1:])
        with pytest.raises(ValueError, match="on meta"):
            group.all_reduce(torch.zeros(2, device="meta"))
        with pytest.raises(ValueError, match=r"float32\[2\] over 1 ranks into float32\[2, 2\]"):
            group.all_gather(torch.zeros(2), torch.zeros(2, 2))
        with pytest.raises(ValueError, match=r"must be \[1, ...\]"):
            group.all_to_all(torch.zeros(2), torch.zeros(2))
        group.close()
        group.close()

    with_group(GroupSpec(names(1)), body)
