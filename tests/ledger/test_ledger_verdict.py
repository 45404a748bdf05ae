"""Planted losses: the verdict names each, whose it is, and the remedy with its quantity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from tests.ledger.accounts import DECODE, MS, Teller, plan_of, reduce
from tests.ledger.histories import Costs

from evener.cost.base import BatchShape
from evener.ledger.ledger import Ledger
from evener.ledger.spans import HoldKind, MakeUp, Milestone
from evener.ledger.verdict import Finding, Hints, verdict
from evener.spec.plan import Plan, Replica
from evener.units import Nanoseconds


def findings(teller: Teller, hints: Hints | None = None) -> dict[str, Finding]:
    return {f.cause: f for f in verdict(teller.ledger.account(), hints).findings}


def steady(teller: Teller, spans: dict[tuple[int, int], dict[str, float]], steps: int = 50, length: float = 20,
           **more: object) -> None:  # fmt: skip
    """Batches of `length` ms one after the other, handed over in time; parts by (stage, rank)."""
    teller.state(0)
    for k in range(steps):
        at = length * k
        teller.batch(max(0, at - 1), {key: (at, at + length, parts) for key, parts in spans.items()}, **more)


def test_a_healthy_account_has_no_findings() -> None:
    teller = Teller(plan_of((30, 2)))
    steady(teller, {(0, 0): {"transfer": 0.5}, (0, 1): {"transfer": 0.5, "straggler": 0.3}})
    said = verdict(teller.ledger.account())
    assert said.findings == ()
    assert said.text()[0] == "Nothing large is lost."
    assert "computed usefully for 97% of it" in said.bound and "faster devices or more replicas" in said.bound


def test_a_slow_rank_gets_fewer_heads() -> None:
    teller = Teller(plan_of((30, 2)))
    steady(teller, {(0, 0): {"straggler": 10}, (0, 1): {}})
    found = findings(teller)["straggler"]
    assert found.where == "stage 0 of replica 0" and found.share == pytest.approx(0.25)
    assert (
        "d0.0.0 waits 0.5 s in collectives for d0.0.1, which computes 1.0 s where d0.0.0 computes 0.5 s"
        in found.evidence
    )
    # A second of it is worth 0.31 of both.
    assert found.remedy == "d0.0.1 arrives late: give it 3 of 9 heads and 512 of 1536 FFN columns, the other more"


def test_the_late_rank_of_an_unequal_split_hears_of_its_own_share() -> None:
    """The one with more heads is late, though the other computes less of its part in a second."""
    teller = Teller(plan_of((30, 2)))
    first, second = teller.plan.replicas[0].stages[0].shards
    uneven = (
        structs.replace(first, heads=(0, 6), ffn=(0, 1024)),
        structs.replace(second, heads=(6, 9), ffn=(1024, 1536)),
    )
    stage = structs.replace(teller.plan.replicas[0].stages[0], shards=uneven)
    teller = Teller(Plan((Replica((stage,)),)))
    steady(teller, {(0, 0): {}, (0, 1): {"straggler": 8}})  # 20 ms of two thirds, 12 ms of a third
    remedy = findings(teller)["straggler"].remedy
    assert remedy == "d0.0.0 arrives late: give it 5 of 9 heads and 896 of 1536 FFN columns, the other more"


def test_a_rank_that_gets_no_core_is_not_given_fewer_heads() -> None:
    teller = Teller(plan_of((30, 2)))
    steady(teller, {(0, 0): {"straggler": 8}, (0, 1): {"contended": 8}})
    found = findings(teller)
    assert "descheduled for 0.4 s" in found["straggler"].evidence
    assert found["straggler"].remedy == "keep other processes off the cores of d0.0.1"
    assert found["contended"].where == "d0.0.1" and found["contended"].share == pytest.approx(0.4)


def test_ranks_that_are_late_in_turns() -> None:
    teller = Teller(plan_of((30, 2)))
    steady(teller, {(0, 0): {"straggler": 4}, (0, 1): {"straggler": 4}})
    assert "late in turns" in findings(teller)["straggler"].evidence


def test_unequal_stages_move_layers() -> None:
    teller = Teller(plan_of((15, 1), (15, 1)))
    steady(teller, {(0, 0): {}, (1, 0): {"bubble": 10}})
    found = findings(teller)["bubble"]
    assert "stage 1 waits 50% of the time for stage 0" in found.evidence
    # 20 ms in 15 layers against 10 ms in 15: five layers take 6.7 and 3.3.
    assert found.remedy == "move 5 layers from stage 0 to stage 1"


def test_equal_stages_that_are_not_full() -> None:
    teller = Teller(plan_of((15, 1), (15, 1)))
    teller.state(0)
    for k in range(50):
        at = 20 * k
        teller.batch(at, {(0, 0): (at, at + 10, {}), (1, 0): (at, at + 20, {"bubble": 10})})
    found = findings(teller)["bubble"]
    assert (
        "batches take 10 +- 0 ms there: too few are in flight for 2 stages (8.0 rows per decode step)" in found.evidence
    )
    assert "fewer stages" in found.remedy and "move" not in found.remedy
    assert found.share == pytest.approx(0.5, abs=0.01)


def test_batches_of_unequal_time() -> None:
    teller = Teller(plan_of((15, 1), (15, 1)))
    teller.state(0)
    for k in range(50):
        at, length = 40 * k, 4 + 16 * (k % 2)
        teller.batch(at, {(0, 0): (at, at + length, {}), (1, 0): (at, at + 2 * length, {"bubble": length})})
    found = findings(teller)["bubble"]
    assert "batches take 12 +- 8 ms there: a short one waits behind a long one" in found.evidence
    assert "--max-num-batched-tokens" in found.remedy


def test_kv_says_how_much_more() -> None:
    teller = Teller(plan_of((30, 1)))
    ledger = teller.ledger
    teller.state(0, short=True)
    ledger.request("waits", 0, Nanoseconds(0), Milestone.ARRIVED, 3000)
    for k in range(10):
        teller.batch(100 * k, {(0, 0): (100 * k, 100 * k + 50, {})})
        teller.state(100 * k + 50, hold=HoldKind.KV, short=True)
        teller.state(100 * k + 100, short=True)
    found = findings(teller, Hints(kv_bytes_per_token=1024))["kv_starved"]
    assert found.where == "replica 0" and found.share == pytest.approx(9 / 19, rel=0.01)
    assert "1 requests of 3000 tokens wait for KV blocks 100% of the time" in found.evidence
    assert (
        "--kv-cache-memory: room for 3000 more tokens and their answers (2.9 MiB and more, over the replica's devices)"
        in found.remedy
    )


def test_requests_that_wait_for_kv_while_batches_run_are_told_too() -> None:
    teller = Teller(plan_of((30, 1)))
    steady(teller, {(0, 0): {}})
    teller.state(1000, short=True)
    for k in range(50, 100):
        teller.batch(20 * k, {(0, 0): (20 * k, 20 * k + 20, {})})
    teller.ledger.settle(Nanoseconds(2000 * MS))
    found = findings(teller)["kv_starved"]
    assert found.lost_s == 0 and "50% of the time" in found.evidence


def test_recomputed_tokens_are_a_matter_of_kv_where_blocks_are_short() -> None:
    teller = Teller(plan_of((30, 1)))
    again = MakeUp(BatchShape(prefill_tokens=40, chunks=1), 10)
    steady(teller, {(0, 0): {}}, made_of=again)
    moved = findings(teller)["recompute"]
    assert "requests came from another replica" in moved.evidence and "nothing" in moved.remedy
    teller.state(1000, short=True)
    for k in range(50, 100):
        teller.batch(20 * k, {(0, 0): (20 * k, 20 * k + 20, {})}, made_of=again)
    teller.ledger.settle(Nanoseconds(2000 * MS))
    found = findings(teller)["recompute"]
    assert "0.5 s go into tokens computed a second time" in found.evidence and "--kv-cache-memory" in found.remedy


def test_recomputed_tokens_are_told_once() -> None:
    """Blocks short for 3% of the time, and 8% of it recomputing: one finding, not two with opposite remedies."""
    teller = Teller(plan_of((30, 1)))
    teller.state(0)
    again = MakeUp(BatchShape(prefill_tokens=64, prefill_pairs=2080, chunks=1), recompute_tokens=64)
    for k in range(50):
        teller.state(20 * k, short=k < 2)
        teller.batch(20 * k, {(0, 0): (20 * k, 20 * k + 20, {})}, made_of=again if k < 4 else DECODE)
    causes = [f.cause for f in verdict(teller.ledger.account()).findings]
    assert causes.count("recompute") + causes.count("kv_starved") == 1


def test_kv_for_no_more_requests_than_slots() -> None:
    teller = Teller(plan_of((30, 1)))
    for k in range(10):
        teller.ledger.request(f"r{k}", 0, Nanoseconds(0), Milestone.ARRIVED, 100)
    teller.state(0, short=True)
    for k in range(10):
        teller.batch(20 * k, {(0, 0): (20 * k, 20 * k + 20, {})})
    teller.ledger.settle(Nanoseconds(200 * MS))
    assert "room for 400 more tokens" in findings(teller, Hints(max_num_seqs=12))["kv_starved"].remedy


def test_an_idle_replica_beside_a_queue() -> None:
    teller = Teller(plan_of((30, 1), replicas=2))
    teller.state(0)
    teller.ledger.waiting(Nanoseconds(0), True)
    for k in range(50):
        teller.batch(20 * k, {(0, 0): (20 * k, 20 * k + 20, {})})
    teller.ledger.settle(Nanoseconds(1000 * MS))
    found = findings(teller)["imbalance"]
    assert (
        found.where == "replica 1" and "replica 0 idles 0%" in found.evidence and "--router least-work" in found.remedy
    )


def test_an_idle_server_has_room() -> None:
    teller = Teller(plan_of((30, 1)))
    for k in range(10):
        teller.state(100 * k)
        teller.batch(100 * k, {(0, 0): (100 * k, 100 * k + 25, {})})
        teller.state(100 * k + 25, work=False)
    teller.ledger.settle(Nanoseconds(1000 * MS))
    said = verdict(teller.ledger.account())
    assert said.findings == () and "room for at least 4.0 times the traffic" in said.bound


def test_nothing_asked_for() -> None:
    teller = Teller(plan_of((30, 1)))
    assert verdict(teller.ledger.account()).text() == ["Nothing large is lost.", "Nothing is recorded yet."]
    teller.ledger.settle(Nanoseconds(3000 * MS))
    assert verdict(teller.ledger.account()).bound == "Nothing was asked for in 3 s."


@given(st.integers(1, 10**11), st.integers(1, 10**11))
def test_nothing_asked_for_after_loading(loading: int, idle: int) -> None:
    """To the nanosecond: seconds as floats leave a rest, of which no share may be taken."""
    ledger = Ledger(plan_of((30, 1)), Costs(), start=Nanoseconds(0))
    ledger.up(0, Nanoseconds(loading))
    ledger.settle(Nanoseconds(loading + idle))
    said = verdict(ledger.account())
    share = loading / (loading + idle)
    assert said.bound == f"Nothing was computed in {(loading + idle) / 1e9:.0f} s, {share:.0%} of it loading or down."


def test_next_to_nothing_asked_for_has_bounded_room() -> None:
    teller = Teller(plan_of((30, 1)))
    teller.state(0)
    teller.batch(0, {(0, 0): (0, 1e-6, {})})
    teller.state(1e-6, work=False)
    teller.ledger.settle(Nanoseconds(10**18))
    assert "room for at least 1000.0 times the traffic" in verdict(teller.ledger.account()).bound


def test_transfer_names_the_operation_and_the_batches() -> None:
    teller = Teller(plan_of((30, 2)))
    parts = {(0, k): {"transfer": 8.0} for k in range(2)}
    steady(teller, parts, traffic=reduce(60 * 4096, 60, 0, 8))
    found = findings(teller)["transfer"]
    assert (
        "all_reduce takes 0.8 s of it, 133 us each for 4.0 KiB; 100% of that in batches of 5-16 rows" in found.evidence
    )
    assert "fewer tensor-parallel ranks than 2" in found.remedy


def test_the_host_is_told_per_batch() -> None:
    teller = Teller(plan_of((30, 1)))
    teller.state(0)
    for k in range(50):
        teller.batch(20 * k, {(0, 0): (20 * k + 5, 20 * k + 20, {})})
    found = findings(teller)["host"]
    assert found.share == pytest.approx(0.25) and "5.00 ms in each of 50 batches" in found.evidence


def test_static_batches() -> None:
    teller = Teller(plan_of((30, 1)))
    for k in range(10):
        teller.state(100 * k, hold=HoldKind.POLICY)
        teller.batch(100 * k + 40, {(0, 0): (100 * k + 40, 100 * k + 100, {})},
                     made_of=MakeUp(BatchShape(decode_rows=5, pad_tokens=5)))  # fmt: skip
    found = findings(teller)
    assert found["held"].share == pytest.approx(0.4) and "--policy equal-time" in found["held"].remedy
    assert found["padding"].share == pytest.approx(0.3) and "50% of the compute is padding" in found["padding"].evidence


def test_late_ends() -> None:
    teller = Teller(plan_of((30, 1)))
    steady(teller, {(0, 0): {}}, late=2)
    assert findings(teller)["speculation"].share == pytest.approx(0.25)


def test_a_lost_replica() -> None:
    teller = Teller(plan_of((30, 1)))
    steady(teller, {(0, 0): {}})
    teller.ledger.down(0, Nanoseconds(1000 * MS), "worker d0.0.0 lost: killed")
    teller.ledger.settle(Nanoseconds(2000 * MS))
    found = findings(teller)["down"]
    assert found.share == pytest.approx(0.5) and "down for 1.0 s: worker d0.0.0 lost: killed" in found.evidence


def test_a_later_loss_is_no_reason_for_earlier_loading() -> None:
    """Three seconds of loading in a window of 40; the worker is lost long after it."""
    ledger = Ledger(plan_of((30, 1)), Costs(), start=Nanoseconds(0))
    ledger.up(0, Nanoseconds(3_000 * MS))
    ledger.down(0, Nanoseconds(100_000 * MS), "worker d0.0.0 lost: killed")
    ledger.settle(Nanoseconds(101_000 * MS))
    then = verdict(ledger.account(Nanoseconds(0), Nanoseconds(40_000 * MS)))
    assert "down" not in {f.cause for f in then.findings}
    now = verdict(ledger.account(Nanoseconds(90_000 * MS)))
    assert [f.evidence for f in now.findings] == ["down for 1.0 s: worker d0.0.0 lost: killed"]
    # Loading is not told either where the window begins a little later than it.
    assert not verdict(ledger.account(Nanoseconds(1_000 * MS), Nanoseconds(31_000 * MS))).findings


def test_a_window_inside_the_batch_in_hand_says_so() -> None:
    teller = Teller(plan_of((30, 1), replicas=2))
    teller.state(0)
    teller.batch(0, {(0, 0): (0, 10, {})})
    teller.ledger.issued(0, 1, Nanoseconds(10 * MS), DECODE)
    teller.ledger.settle(Nanoseconds(1_000 * MS))
    said = verdict(teller.ledger.account(Nanoseconds(500 * MS))).bound
    assert said == "Nothing of this window is accounted for yet on d0.0.0: a batch still runs there."


def test_workers_that_share_a_core() -> None:
    plan = plan_of((30, 2))
    names = {"d0.0.0": "cpu:0", "d0.0.1": "cpu:0#1"}
    stage = plan.replicas[0].stages[0]
    shards = tuple(type(s)(names[s.device], s.heads, s.ffn) for s in stage.shards)
    plan = type(plan)((type(plan.replicas[0])((type(stage)(stage.layers, shards),)),))
    teller = Teller(plan)
    steady(teller, {(0, 0): {"contended": 9}, (0, 1): {"contended": 9}})
    said = verdict(teller.ledger.account()).findings
    assert {f.where for f in said} == {"cpu:0", "cpu:0#1"}
    assert all("runs on the same core" in f.evidence and "a core of its own" in f.remedy for f in said)


def test_unexplained_time_is_told_early() -> None:
    teller = Teller(plan_of((30, 1)))
    steady(teller, {(0, 0): {"compute": 19.5}})
    assert findings(teller)["unattributed"].share == pytest.approx(0.025)


def test_the_largest_loss_comes_first() -> None:
    teller = Teller(plan_of((30, 2)))
    teller.state(0)
    for k in range(50):
        at = 20 * k
        teller.batch(at, {(0, j): (at + 2, at + 20, {"transfer": 6}) for j in range(2)}, made_of=DECODE)
    said = verdict(teller.ledger.account())
    assert [f.cause for f in said.findings] == ["transfer", "host"]
    assert said.text()[0].startswith("stage 0 of replica 0 loses 30% (transfer): ")
