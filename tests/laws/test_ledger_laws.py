"""Law 2: the ledger closes. Random plans, histories and bundles of spans."""

import random

from hypothesis import HealthCheck, given, settings
from tests.ledger.histories import START, Case, Costs, cases, explain, make_history, play, windows

from evener.ledger.causes import COMPUTE, Cause
from evener.ledger.makeup import weights
from evener.units import Nanoseconds

law = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@law
@given(cases)
def test_law_2_ledger_closes(case: Case) -> None:
    """Every nanosecond of every device has exactly one cause, up to the last second."""
    history = make_history(case)
    account = play(case, history).account()
    assert account.window_s == (history.now - START) / 1e9
    for device in account.devices.values():
        assert min(device.causes_ns) >= 0
        assert sum(device.causes_ns) == history.now - START
    assert account.total.wall_ns == sum(d.wall_ns for d in account.devices.values())
    for group in (account.stages, account.replicas):
        for cause in Cause:
            assert sum(x.causes_ns[cause] for x in group.values()) == account.total.causes_ns[cause]


@law
@given(cases)
def test_law_2_every_nanosecond_has_the_first_cause_that_evidence_gives(case: Case) -> None:
    """The precedence among idle causes, against a reading of the history that looks at each nanosecond by itself."""
    history = make_history(case)
    account = play(case, history).account()
    for device in account.devices.values():
        expected = explain(history, case, device.replica, device.stage, device.rank)
        found = {c: device.causes_ns[c] for c in Cause if c not in COMPUTE and device.causes_ns[c]}
        assert found == {c: n for c, n in expected.items() if n}


@law
@given(cases)
def test_law_2_compute_is_divided_by_the_make_up(case: Case) -> None:
    """Compute sums to what the spans say, and each cause is within a nanosecond per span of its share."""
    history = make_history(case)
    account = play(case, history).account()
    for device in account.devices.values():
        down = history.down[device.replica]
        shares = dict.fromkeys(COMPUTE, 0.0)
        compute = spans = 0
        for life in history.batches[device.replica]:
            for x in life.spans:
                if (x.stage, x.rank) == (device.stage, device.rank) and (down is None or x.ended <= down):
                    causes, parts = weights(Costs(), device.replica, device.stage, life.made_of, life.late, 1)
                    for cause, weight in zip(causes, parts, strict=True):
                        shares[Cause(cause)] += x.compute * weight / sum(parts)
                    compute, spans = compute + x.compute, spans + 1
        assert sum(device.causes_ns[c] for c in COMPUTE) == compute
        for cause in COMPUTE:
            assert abs(device.causes_ns[cause] - shares[cause]) <= spans + 1e-6


@law
@given(cases)
def test_law_2_windows_add_up(case: Case) -> None:
    """[a, b) and [b, c) are [a, c), cause by cause, wherever the cuts fall."""
    history = make_history(case)
    ledger = play(case, history)
    for a, b, c in windows(random.Random(case.seed), history.now):
        one, two, both = (
            ledger.account(Nanoseconds(x), Nanoseconds(y)).devices for x, y in ((a, b), (b, c), (a, c))
        )  # fmt: skip
        for name, device in both.items():
            assert device.wall_ns == c - a
            assert min(one[name].causes_ns) >= 0
            sums = tuple(p + q for p, q in zip(one[name].causes_ns, two[name].causes_ns, strict=True))
            assert sums == device.causes_ns


@law
@given(cases)
def test_law_2_bundles_of_spans_do_not_matter(case: Case) -> None:
    """Spans may come late, in any order among devices and with settlements between: the account is the same."""
    history = make_history(case)
    rng = random.Random(case.seed + 1)
    at_once, later = play(case, history).account(), play(case, history, rng).account()
    assert at_once.devices == later.devices and at_once.links == later.links


def test_histories_reach_the_rare_paths() -> None:
    """The laws would be empty if some cause never occurred."""
    seen: set[Cause] = set()
    for seed in range(60):
        case = Case(seed, 2, 2, 2, 10, seed % 2 == 0, seed % 3 == 0)
        total = play(case, make_history(case)).account().total
        seen |= {c for c in Cause if total.causes_ns[c]}
    assert seen == set(Cause) - {Cause.MIGRATION}
