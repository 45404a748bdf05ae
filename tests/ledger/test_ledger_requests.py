"""Where one request's latency went."""

import pytest
from tests.ledger.accounts import MS, Teller, plan_of

from evener.ledger.requests import RequestLog, Step, stretches
from evener.ledger.spans import Milestone
from evener.units import Nanoseconds

A, S, F, P, M, E = (
    Milestone.ARRIVED,
    Milestone.ADMITTED,
    Milestone.FIRST_TOKEN,
    Milestone.PREEMPTED,
    Milestone.MOVED,
    Milestone.ENDED,
)


def life(*steps: tuple[Milestone, int] | tuple[Milestone, int, int]) -> list[Step]:
    return [Step(s[0], Nanoseconds(s[1]), s[2] if len(s) > 2 else 0, 7) for s in steps]


def phases(
    *steps: tuple[Milestone, int] | tuple[Milestone, int, int], now: int = 999
) -> list[tuple[str, int, int, int]]:
    return [(s.name, s.replica, s.began, s.ended) for s in stretches(life(*steps), Nanoseconds(now))]


def test_phases_tile_a_life() -> None:
    assert phases((A, 10), (S, 30), (F, 50), (E, 90)) == [
        ("queued", 0, 10, 30), ("prefill", 0, 30, 50), ("decode", 0, 50, 90),
    ]  # fmt: skip


def test_preempted_and_moved() -> None:
    assert phases((A, 10), (S, 20), (P, 30), (S, 40), (F, 50), (P, 60), (M, 70, 1), (S, 80, 1), (E, 95, 1)) == [
        ("queued", 0, 10, 20), ("prefill", 0, 20, 30), ("requeued", 0, 30, 40), ("prefill", 0, 40, 50),
        ("decode", 0, 50, 60), ("requeued", 0, 60, 70), ("requeued", 1, 70, 80), ("decode", 1, 80, 95),
    ]  # fmt: skip


def test_moved_while_it_waits_is_queued_still() -> None:
    assert phases((A, 10), (M, 20, 1), (S, 30, 1), now=40) == [
        ("queued", 0, 10, 20), ("queued", 1, 20, 30), ("prefill", 1, 30, 40),
    ]  # fmt: skip


def test_started_at_once_has_not_queued() -> None:
    assert phases((A, 10), (S, 10), (F, 15), (E, 15)) == [("prefill", 0, 10, 15)]


def test_only_the_newest_are_kept() -> None:
    log = RequestLog(2)
    for name in "abc":
        log.tell(name, Step(A, Nanoseconds(1), 0, 5))
    log.tell("a", Step(E, Nanoseconds(2), 0, 5))
    assert log.ids() == ["b", "c"] and log.steps("a") == []
    none = RequestLog(0)
    none.tell("a", Step(A, Nanoseconds(1), 0, 5))
    assert none.ids() == []


def test_a_phase_says_what_the_devices_did_meanwhile() -> None:
    teller = Teller(plan_of((4, 2)))
    ledger = teller.ledger
    teller.state(0)
    ledger.request("r", 0, Nanoseconds(0), A, 40)
    ledger.request("r", 0, Nanoseconds(0), S, 0)
    teller.batch(0, {(0, 0): (0, 400, {"straggler": 100}), (0, 1): (0, 400, {})})
    ledger.request("r", 0, Nanoseconds(400 * MS), F, 1)
    teller.batch(400, {(0, 0): (400, 1000, {}), (0, 1): (400, 1000, {})})
    ledger.request("r", 0, Nanoseconds(1000 * MS), E, 9)
    account = ledger.request_account("r")
    assert account is not None and (account.prompt_tokens, account.output_tokens) == (40, 9)
    prefill, decode = account.phases
    assert prefill.causes == {"decode": pytest.approx(0.35), "straggler": pytest.approx(0.05)}
    assert decode.causes == {"decode": pytest.approx(0.6)} and decode.seconds == pytest.approx(0.6)
    assert ledger.request_account("unknown") is None
    assert ledger.requests() == ["r"]
