"""Accounts: what is in them, windows, and what they serialise to."""

import json

import msgspec
import pytest
from tests.ledger.accounts import DECODE, MS, Teller, plan_of, reduce, span
from tests.ledger.histories import Costs

from evener.cost.base import BatchShape
from evener.errors import InvalidInput
from evener.ledger.account import Account
from evener.ledger.causes import Cause
from evener.ledger.ledger import Ledger
from evener.ledger.spans import MakeUp, Milestone
from evener.ledger.text import table
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds


class Work:
    """A row is 1 Mflop, a batch reads 1 MB; the device does 1 Gflop/s and reads 100 MB/s."""

    def of(self, replica: int, stage: int, rank: int, shape: BatchShape) -> tuple[float, float]:
        return 1e6 * shape.tokens, 1e6

    def peak(self, device: str) -> tuple[float, float]:
        return 1e9, 1e8


def two_ranks() -> Teller:
    """10 ms of loading was not told; 2 batches of 20 ms on two ranks, then idle until 60 ms."""
    teller = Teller(plan_of((4, 2)), Work())
    teller.state(0)
    for k in range(2):
        at = 22 * k
        teller.batch(at, {
            (0, 0): (at + 1, at + 21, {"straggler": 4, "transfer": 1}),
            (0, 1): (at + 1, at + 21, {"transfer": 1}),
        }, traffic=reduce(4096, 8, 4, 1), done=at + 22)  # fmt: skip
    teller.state(44, work=False)
    teller.ledger.settle(Nanoseconds(60 * MS))
    return teller


def test_an_account_says_where_the_time_went() -> None:
    account = two_ranks().ledger.account()
    assert account.window_s == 0.06
    one, two = account.devices["d0.0.0"], account.devices["d0.0.1"]
    assert one.causes_ns[Cause.DECODE] == 30 * MS and two.causes_ns[Cause.DECODE] == 38 * MS
    assert one.causes_ns[Cause.STRAGGLER] == 8 * MS
    assert one.causes_ns[Cause.HOST] == 4 * MS, "a millisecond before each batch, and one until each result was seen"
    assert one.causes_ns[Cause.NO_DEMAND] == 16 * MS
    assert (one.batches, one.spans, one.heads, one.ffn) == (2, 2, 5, 768)
    stage = account.stages["0.0"]
    assert stage.compute_s == pytest.approx(0.068) and stage.layers == 4
    assert account.replicas["0"].mean_decode_rows == 8
    assert account.total.wall_s == pytest.approx(0.12)


def test_useful_is_set_beside_the_peak() -> None:
    one = two_ranks().ledger.account().devices["d0.0.0"]
    # 8 rows: 8 ms of operations, 10 ms of reading; it took 15.
    assert one.achieved_over_peak == pytest.approx(10 / 15)
    assert one.flop_s == pytest.approx(8e6 / 15e-3)
    assert one.bytes_s == pytest.approx(1e6 / 15e-3)
    without = Teller(plan_of((4, 1))).ledger.account().devices["d0.0.0"]
    assert without.achieved_over_peak is None


def test_links_by_operation_and_batch_size() -> None:
    teller = two_ranks()
    big = MakeUp(BatchShape(prefill_tokens=300, prefill_pairs=300 * 301 // 2, sampled_rows=1, chunks=1))
    teller.batch(60, {(0, k): (60, 80, {"transfer": 2}) for k in range(2)}, made_of=big,
                 traffic=reduce(100_000, 8, 0, 2))  # fmt: skip
    small, large = teller.ledger.account().links
    assert (small.op, small.rows, small.count, small.nbytes) == ("all_reduce", "5-16", 32, 4 * 4096)
    assert small.waited_s == pytest.approx(0.016) and small.moving_s == pytest.approx(0.004)
    assert (large.rows, large.count, large.moving_s) == ("257-1024", 16, pytest.approx(0.004))


def test_short_of_kv_counts_while_batches_run() -> None:
    teller = Teller(plan_of((4, 1)))
    ledger = teller.ledger
    ledger.request("a", 0, Nanoseconds(0), Milestone.ARRIVED, 100)
    ledger.request("b", 0, Nanoseconds(0), Milestone.ARRIVED, 300)
    teller.state(0)
    ledger.request("a", 0, Nanoseconds(0), Milestone.ADMITTED, 0)
    teller.state(10, short=True)
    teller.batch(0, {(0, 0): (0, 50, {})})
    ledger.request("b", 0, Nanoseconds(30 * MS), Milestone.ADMITTED, 0)
    teller.state(40, short=False)
    ledger.settle(Nanoseconds(100 * MS))
    replica = ledger.account().replicas["0"]
    assert replica.short_of_kv_s == pytest.approx(0.03)
    assert replica.short_of_kv_tokens == 200, "300 tokens waited for two thirds of that time"


def test_a_window_is_a_part_of_the_whole() -> None:
    account = two_ranks().ledger.account(Nanoseconds(44 * MS), Nanoseconds(50 * MS))
    assert account.since_s == 0.044 and account.window_s == pytest.approx(0.006)
    assert account.devices["d0.0.1"].wall_ns == 6 * MS


def test_a_long_idle_time_is_not_mixed_with_what_came_before() -> None:
    teller = two_ranks()
    teller.ledger.settle(Nanoseconds(10_000 * MS))
    device = teller.ledger.account(Nanoseconds(5_000 * MS), Nanoseconds(6_000 * MS)).devices["d0.0.0"]
    assert device.causes_ns[Cause.NO_DEMAND] == 1_000 * MS


def test_json_is_what_the_tools_read() -> None:
    account = two_ranks().ledger.account()
    data = json.loads(msgspec.json.encode(account))
    device = data["devices"]["d0.0.0"]
    assert list(device["causes"]) == [c.label for c in Cause]
    assert sum(device["causes"].values()) == pytest.approx(device["wall_s"]) == data["window_s"]
    assert 0 < device["achieved_over_peak"] < 1
    assert msgspec.json.decode(msgspec.json.encode(account), type=Account) == account


def test_a_busy_device_is_known_up_to_its_last_span() -> None:
    teller = two_ranks()
    teller.state(60)
    teller.ledger.issued(0, 2, Nanoseconds(60 * MS), DECODE)
    teller.ledger.settle(Nanoseconds(500 * MS))
    assert teller.ledger.account().devices["d0.0.0"].wall_ns == 60 * MS


def test_windows_that_cannot_be() -> None:
    ledger = Ledger(plan_of((4, 1)), Costs(), start=Nanoseconds(0), resolution=None)
    ledger.up(0, Nanoseconds(5))
    ledger.settle(Nanoseconds(100))
    assert ledger.account().devices["d0.0.0"].wall_ns == 100
    with pytest.raises(InvalidInput, match="resolution=None"):
        ledger.account(Nanoseconds(50))
    with pytest.raises(InvalidInput, match=r"\[50, 20\) runs backwards"):
        two_ranks().ledger.account(Nanoseconds(50), Nanoseconds(20))


def test_forgotten_windows() -> None:
    """What begins before the oldest checkpoint begins there; what ends before it is refused by name."""
    teller = Teller(plan_of((30, 1)))
    ledger = Ledger(teller.plan, Costs(), start=Nanoseconds(0), resolution=Nanoseconds(10 * MS), keep=20)
    ledger.up(0, Nanoseconds(0))
    teller.ledger = ledger
    teller.state(0)
    for k in range(100):
        teller.batch(10 * k, {(0, 0): (10 * k, 10 * k + 10, {})})
    account = ledger.account(Nanoseconds(0), Nanoseconds(990 * MS))
    assert (
        account.since_s > 0.5 and account.until_s == 0.99 and account.window_s == pytest.approx(0.99 - account.since_s)
    )
    for since in (None, Nanoseconds(0), Nanoseconds(60 * MS)):
        with pytest.raises(InvalidInput, match=r"ends 0\.1 s after the start.*is forgotten; ask for a later one"):
            ledger.account(since, Nanoseconds(90 * MS))


def test_a_device_used_twice_is_refused() -> None:
    shard = Shard("cpu:0", (0, 1), (0, 1))
    plan = Plan((Replica((Stage((0, 1), (shard,)), Stage((1, 2), (shard,)))),))
    with pytest.raises(InvalidInput, match="cpu:0 twice; name a second worker there cpu:0#1"):
        Ledger(plan, Costs(), start=Nanoseconds(0))


def test_a_replica_that_comes_back() -> None:
    teller = Teller(plan_of((4, 1)))
    ledger = teller.ledger
    teller.state(0)
    ledger.issued(0, 0, Nanoseconds(0), DECODE)
    ledger.down(0, Nanoseconds(10 * MS), "killed")
    assert ledger.account().replicas["0"].down == "killed"
    ledger.span(span(0, 0, 0, 0, 0, 5, {}))
    ledger.up(0, Nanoseconds(30 * MS))
    ledger.settle(Nanoseconds(40 * MS))
    account = ledger.account()
    assert account.late_spans == 1 and account.replicas["0"].down is None
    assert account.devices["d0.0.0"].causes_ns[Cause.DOWN] == 30 * MS
    assert account.devices["d0.0.0"].causes_ns[Cause.NO_DEMAND] == 10 * MS


def test_what_a_stage_moved_is_told_at_once_or_by_each_device() -> None:
    accounts = []
    for at_once in (True, False):
        ledger = Ledger(plan_of((4, 2)), Costs(), start=Nanoseconds(0))
        ledger.up(0, Nanoseconds(0))
        for number in range(3):
            ledger.issued(0, number, Nanoseconds(number * 10 * MS), DECODE)
            began, moved = number * 10, reduce(4096, 8, 1.0, 2.0)
            parts = {"straggler": 1.0, "transfer": 2.0}
            if at_once and number < 2:
                ledger.stage_span(span(0, 0, 0, number, began, began + 10, parts, traffic=moved))
            else:
                for rank in range(2):
                    ledger.span(span(0, 0, rank, number, began, began + 10, parts, traffic=moved))
            if number:  # told of before the one before is done
                ledger.done(0, number - 1, Nanoseconds((began + 10) * MS), 0)
        ledger.done(0, 2, Nanoseconds(40 * MS), 0)
        accounts.append(ledger.account())
    assert accounts[0] == accounts[1]
    assert accounts[0].links[0].count == 2 * 3 * 8


def test_repeated_steps_count_as_so_many_batches() -> None:
    teller = Teller(plan_of((4, 1)), Work())
    teller.state(0)
    teller.batch(0, {(0, 0): (0, 100, {"host": 5})}, repeat=10)
    device = teller.ledger.account().devices["d0.0.0"]
    assert (device.batches, device.spans) == (10, 1)
    assert device.causes_ns[Cause.HOST] == 5 * MS and device.causes_ns[Cause.DECODE] == 95 * MS
    assert device.achieved_over_peak == pytest.approx(10 * 10 / 95)
    assert teller.ledger.account().replicas["0"].mean_decode_rows == 8


def test_spans_that_contradict_themselves_are_our_mistake() -> None:
    teller = Teller(plan_of((4, 1)))
    teller.state(0)
    with pytest.raises(AssertionError, match="2000000 ns longer than it"):
        teller.batch(0, {(0, 0): (0, 1, {"compute": 2, "bubble": 1})})
    with pytest.raises(AssertionError, match="never issued"):
        teller.ledger.span(span(0, 0, 0, 9, 5, 6, {}))


def test_the_table_has_a_line_per_device_and_columns_for_what_occurs() -> None:
    lines = table(two_ranks().ledger.account()).splitlines()
    assert lines[0].split()[:4] == ["device", "seconds", "decode", "transfer"]
    assert "bubble" not in lines[0]
    assert lines[1].split() == ["d0.0.0", "0.06", "50.0", "3.3", "13.3", "6.7", "26.7", "67%"]
    assert lines[-1].startswith("all")
