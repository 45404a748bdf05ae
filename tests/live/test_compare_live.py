"""Comparisons and recordings with real workers: what the run said of itself, its recording says again."""

from pathlib import Path

import pytest

from evener.api import make_options
from evener.ledger.causes import Cause
from evener.units import NS_PER_S
from evener.workload.backtest import achieved, predicted, read_traffic, set_beside
from evener.workload.calibrate import observe
from evener.workload.compare import Case, compare, requests_of, warm_up_of
from evener.workload.replay import recorded_costs, replay
from evener.workload.spec import parse_traffic

pytestmark = pytest.mark.slow


def test_a_live_comparison_and_its_recordings(tiny: Path, tmp_path: Path) -> None:
    requests = requests_of(parse_traffic("requests=24,in=lognormal:40:0.6:8:120,out=lognormal:20:0.5:4:60"))
    devices = ("cpu:0", "cpu:1")
    records = [tmp_path / "tensor.evener", tmp_path / "data.evener"]
    cases = [
        Case("tensor", make_options(model=str(tiny), devices=devices, tensor_parallel_size=2, record=str(records[0]))),
        Case("data", make_options(model=str(tiny), devices=devices, data_parallel_size=2, record=str(records[1]))),
    ]
    results = compare(cases, requests, live=True, warm_up=warm_up_of(requests, 2))
    for result, record in zip(results, records, strict=True):
        assert result.live and result.report.completed == 24 and result.report.failed == 0
        account = result.account
        assert {d.wall_ns for d in account.devices.values()} == {round(account.window_s * NS_PER_S)}
        assert account.total.share(Cause.DOWN) == 0 and account.total.useful > 0.02
        again = replay(record)
        assert again.difference is None and again.ledger is not None and again.steps >= 26
        traffic = read_traffic(record, skip=2)
        did = achieved(traffic, again)
        # The client's window begins a little before its first request has arrived in the engine, and ends later.
        assert did.report.completed == 24 and did.report.output_tokens == result.report.output_tokens
        assert did.report.duration_s <= result.report.duration_s
        assert did.account.total.useful == pytest.approx(result.account.total.useful, rel=0.1)
        fitted = observe(record).fit(recorded_costs(traffic.header).version + 1)
        lines = {x.what: x for x in set_beside(predicted(traffic, fitted), did)}
        assert fitted.error() is not None and lines["output tok/s"].predicted > 0
