"""Back-test: what the simulator predicts for five plans with a fitted cost model, beside what live runs achieved.

Requests of a production trace (lengths scaled to the context) are served live: all at once (saturated), and with the
trace's own arrivals at 70% of the saturated rate. For either load calibration runs serve other requests of the trace in
the same way, and the cost model is fitted to their spans: a device whose cache holds the weights while few requests run
takes half the time for a step that it takes for the same step among many. Calibration and runs take turns, as a machine
that others use changes its speed from minute to minute. The same arrivals go through the simulator with the fitted
model.

The error is set beside the spread of the live runs (largest minus smallest over the median): no prediction can be
better than that. Nothing predicts what other processes take from the devices (`contended`); two columns take it as
known, second by second, and so show the error of the model itself. The last says how far the prediction moves when
every device is 5% slower: where bursts exceed what the plan can carry, queues multiply an error of the model.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from msgspec import structs

from common import RESULTS, SHARED, markdown, save
from evener.api import EngineOptions, make_options, prepare
from evener.cost.base import CostModel
from evener.execute.sim.traffic import SlowDown
from evener.ledger.causes import Cause
from evener.units import Nanoseconds
from evener.workload.backtest import Line, achieved, others_took, predicted, read_traffic, set_beside
from evener.workload.calibrate import observe
from evener.workload.compare import requests_of, warm_up_of
from evener.workload.rehearse import run_live
from evener.workload.replay import replay
from evener.workload.requests import TimedRequest
from evener.workload.spec import Arrivals
from evener.workload.trace import Trace, read_trace

WARM_UP = 4
LOAD = 0.7
SLOWER = 1.05
"""How much slower the devices are assumed, to see how far a prediction moves."""
TARGETS = {"output tok/s": 0.05, "TTFT": 0.10, "TPOT": 0.10, "share": 3.0}
"""Largest errors wanted: relative, and of ledger shares in points."""
SATURATED = ("output tok/s",)
LOADED = ("TTFT mean, ms", "TTFT p90, ms", "TPOT mean, ms", "TPOT p90, ms")


def plans(context: int, traffic_mix: str, dtype: str) -> dict[str, EngineOptions]:
    """One device, tensor, pipeline and data parallel, and unlike devices."""
    common: dict[str, Any] = {"max_model_len": context, "traffic_mix": traffic_mix, "dtype": dtype}
    two, unlike = ("cpu:0", "cpu:1"), ("cpu:0", "cpu:1,slowdown=2")
    return {
        "one device": make_options(devices=("cpu:0",), **common),
        "tp2": make_options(devices=two, tensor_parallel_size=2, **common),
        "pp2": make_options(devices=two, pipeline_parallel_size=2, **common),
        "dp2": make_options(devices=two, data_parallel_size=2, **common),
        "tp2, unlike 1:2": make_options(devices=unlike, tensor_parallel_size=2, **common),
    }


def requests(trace: Trace, rate: float = math.inf) -> list[TimedRequest]:
    """With the trace's own arrivals at a mean rate (requests per second); inf: all at once."""
    made = requests_of(Arrivals(trace, None))
    first, scale = trace.rows[0].arrival_s, trace.mean_rate() / rate
    return [structs.replace(r, arrival_s=(r.arrival_s - first) * scale) for r in made]


def run(options: EngineOptions, todo: list[TimedRequest], path: Path) -> None:
    """Serve and record."""
    unfinished = path.with_suffix(".unfinished")
    prepared = prepare(structs.replace(options, record=str(unfinished), max_queue=len(todo)))
    served = run_live(prepared, todo, warm_up_of(todo, WARM_UP))
    if served.report.failed:
        raise SystemExit(f"{served.report.failed} requests failed: {served.report.failures}")
    unfinished.rename(path)


def beside(costs: CostModel, paths: Sequence[Path]) -> tuple[list[dict[str, Any]], float]:
    """Figures of the median run, its prediction, and the spread over the runs; and the share that was contended."""
    runs: list[dict[str, Line]] = []
    given: list[dict[str, Line]] = []
    slower: list[dict[str, Line]] = []
    contended = []
    for path in paths:
        traffic = read_traffic(path, WARM_UP)
        again = replay(path)
        did, took = achieved(traffic, again), others_took(traffic, again)
        runs.append({line.what: line for line in set_beside(predicted(traffic, costs), did)})
        knowing = predicted(traffic, costs, slow_downs=took)
        given.append({line.what: line for line in set_beside(knowing, did)})
        late = [SlowDown(device, Nanoseconds(0), SLOWER) for device in costs.plan.devices()]
        slower.append({line.what: line for line in set_beside(predicted(traffic, costs, slow_downs=late), did)})
        contended.append(did.account.total.share(Cause.CONTENDED))
    out = []
    for what in dict.fromkeys(w for r in runs for w in r):
        share = what.endswith("%")
        said, got = _medians([r.get(what) for r in runs])
        knowing_said, _ = _medians([r.get(what) for r in given])
        slower_said, _ = _medians([r.get(what) for r in slower])
        one, knowing_one = Line(what, said, got, share), Line(what, knowing_said, got, share)
        each = [x.achieved for r in runs if (x := r.get(what)) is not None and x.achieved is not None]
        spread = max(each, default=0.0) - min(each, default=0.0)
        if not share and got:
            spread /= got
        out.append({"what": what, "predicted": said, "achieved": got, "error": one.error,
                    "spread": spread if len(runs) > 1 else None, "given": knowing_said,
                    "given_error": knowing_one.error, "moves": slower_said / said - 1 if said else None,
                    "share": share})  # fmt: skip
    return out, median(contended)


def _medians(lines: Sequence[Line | None]) -> tuple[float, float]:
    """Predicted and achieved; a share that a run does not list is 0."""
    there = [x for x in lines if x is not None] or [Line("", 0.0, 0.0)]
    return median(x.predicted or 0.0 for x in there), median(x.achieved or 0.0 for x in there)


def measure(options: EngineOptions, trace: Trace, n: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Calibrate, serve saturated and loaded, predict."""
    fit, other = Trace(trace.rows[n:]), Trace(trace.rows[:n])  # whatever follows the first n calibrates
    rate = math.inf
    out: dict[str, Any] = {"fit_error": {}, "contended": {}}
    for load in ("saturated", "loaded"):
        fits, runs = ([folder / f"{load}-{what}{k}" for k in range(rounds)] for what in ("fit", "run"))
        for k in range(rounds):
            print(f"  {load}, {rate:.2f} requests/s, round {k + 1} of {rounds}", file=sys.stderr, flush=True)
            for some, path in ((fit, fits[k]), (other, runs[k])):
                if not path.exists():
                    run(options, requests(some, rate), path)
        costs = observe(*fits).fit(1)
        out["fit_error"][load] = costs.error()
        out[load], out["contended"][load] = beside(costs, runs)
        if load == "saturated":
            rate = LOAD * n / next(x["achieved"] for x in out[load] if x["what"] == "duration, s")
    return {**out, "rate": rate}


def rows_of(name: str, got: dict[str, Any]) -> list[list[object]]:
    """One row per figure that has a target, and the largest error of a ledger share."""
    rows = []
    for load, wanted in (("saturated", SATURATED), ("loaded", LOADED)):
        figures = {x["what"]: x for x in got[load]}
        for what in wanted:
            rows.append([name, load, *_row(figures[what])])
        worst = max((x for x in got[load] if x["share"]), key=lambda x: abs(x["error"] or 0.0))
        rows.append([name, load, *_row({**worst, "what": f"ledger, worst: {worst['what']}"})])
    return rows


def _row(x: dict[str, Any]) -> list[object]:
    shown = (lambda v: f"{v:+.1f} points") if x["share"] else (lambda v: f"{v:+.1%}")
    spread = None if x["spread"] is None else shown(x["spread"]).lstrip("+")
    errors = ["-" if x[k] is None else shown(x[k]) for k in ("error", "given_error")]
    if x["share"]:  # there what others took counts as compute
        return [x["what"], x["predicted"], x["achieved"], errors[0], spread, None, None, None]
    moves = None if x["moves"] is None else f"{x['moves']:+.0%}"
    return [x["what"], x["predicted"], x["achieved"], errors[0], spread, x["given"], errors[1], moves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=SHARED / "traces" / "azure2023_conv.csv")
    parser.add_argument("--requests", type=int, default=300, help="to predict")
    parser.add_argument(
        "--calibrate", type=int, default=200, help="requests after these, for the fit; they fill all slots"
    )
    parser.add_argument("--dtype", default="int8", help="of weights and KV cache")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="live runs of each")
    parser.add_argument("--only", help="plans whose names contain this; the others stay as measured before")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the recordings (default: thrown away); those that it has are not made again",
    )
    args = parser.parse_args()

    trace = read_trace(args.trace).first(args.requests + args.calibrate).within(args.context)
    size = len(trace.rows)
    prompt, answer = (sum(getattr(r, k) for r in trace.rows) / size for k in ("input_tokens", "output_tokens"))
    mix = f"in={prompt:.0f},out={answer:.0f}"
    chosen = {k: v for k, v in plans(args.context, mix, args.dtype).items() if args.only is None or args.only in k}
    if not chosen:
        parser.error(f"--only {args.only!r}: plans are {', '.join(plans(args.context, mix, args.dtype))}")
    settings = {"trace": args.trace.name, "requests": args.requests, "context": args.context, "rounds": args.rounds}
    settings |= {"calibrate": args.calibrate, "dtype": args.dtype}
    found = RESULTS / "backtest.json"
    before = json.loads(found.read_text()) if args.only and found.exists() else {}
    results = before["plans"] if before.get("settings") == settings else {}
    with TemporaryDirectory() as folder:
        for name, options in chosen.items():
            print(name, file=sys.stderr, flush=True)
            at = (args.keep or Path(folder)) / re.sub(r"\W+", "-", name)
            at.mkdir(parents=True, exist_ok=True)
            made_with = at / "settings.json"
            if made_with.exists() and json.loads(made_with.read_text()) != settings:
                parser.error(f"--keep {args.keep}: {made_with} tells of other settings; name another folder")
            made_with.write_text(json.dumps(settings))
            results[name] = measure(options, trace, args.requests, args.rounds, at)
    headers = ["plan", "load", "figure", "predicted", "achieved", "error", f"spread of {args.rounds} live runs",
               "knowing what others took", "error", "moves, 5% slower"]  # fmt: skip
    print(markdown(headers, [row for name, result in results.items() for row in rows_of(name, result)]))
    noise = [[k, load, f"{v['fit_error'][load]:.1%}", f"{v['contended'][load]:.1%}"] for k, v in results.items()
             for load in v["contended"]]  # fmt: skip
    print(markdown(["plan", "load", "fit, error per span", "contended"], noise))
    save("backtest", {"settings": settings, "targets": TARGETS, "plans": results})


if __name__ == "__main__":
    main()
