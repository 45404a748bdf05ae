"""Planted losses: six things that slow a deployment, what the ledger's verdict says of each, and what its remedy gains.

Each is planted in a live engine and served some requests; the verdict must name its cause and place. Then the remedy
is applied as the verdict words it (so many heads, layers, bytes ...) and the same requests are served again, in
alternation over the rounds. The gain is the ratio of output tokens per second; for the idle server, of requests.

The first row is also a test of the ledger itself: in tensor parallel the fast rank's straggler time must be what the
slow rank computes longer.
"""

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from msgspec import structs

from common import markdown, save
from evener.api import EngineOptions, Prepared, make_options, prepare
from evener.ledger.causes import Cause
from evener.ledger.verdict import Finding, Hints, Verdict, verdict
from evener.plan.load import save_plan
from evener.spec.plan import Plan, Shard, Stage
from evener.workload.compare import requests_of, warm_up_of
from evener.workload.rehearse import Rehearsal, run_live, simulate
from evener.workload.requests import TimedRequest
from evener.workload.spec import parse_traffic


@dataclass(frozen=True)
class Setting:
    """What runs: the engine, the requests, and a process that eats a core beside it (-1: none)."""

    options: EngineOptions
    requests: list[TimedRequest]
    hog: int = -1


@dataclass(frozen=True)
class Planted:
    """A loss, where the verdict must find it, and how its remedy is carried out."""

    name: str
    setting: Setting
    causes: tuple[Cause, ...]
    """Any of these names it."""
    where: str
    """Part of the finding's place."""
    mend: Callable[[Setting, Prepared, Rehearsal, Finding | None, Path], tuple[Setting, str]]
    """The mended setting, and what was done."""


def requests(spec: str) -> list[TimedRequest]:
    return requests_of(parse_traffic(spec))


# ---- what each remedy says, done ------------------------------------------------------------------------------


def written(setting: Setting, plan: Plan, folder: Path) -> EngineOptions:
    """The same engine with this plan."""
    path = folder / "mended.yaml"
    save_plan(plan, path)
    return structs.replace(
        setting.options, plan=str(path), split="time", tensor_parallel_size=1, pipeline_parallel_size=1,
        data_parallel_size=1,
    )  # fmt: skip


def resplit(
    setting: Setting, prepared: Prepared, run: Rehearsal, finding: Finding | None, folder: Path
) -> tuple[Setting, str]:
    """`give it 3 of 9 heads and 512 of 1536 FFN columns, the other more`: the late rank is the second."""
    found = re.search(r"give it (\d+) of (\d+) heads and (\d+) of (\d+) FFN", finding.remedy if finding else "")
    if found is None:
        return setting, "no remedy with a quantity"
    heads, all_heads, ffn, all_ffn = map(int, found.groups())
    [replica] = prepared.plan.replicas
    [stage] = replica.stages
    vocab = prepared.model.vocab
    cut = vocab - vocab * ffn // all_ffn
    names = [shard.device for shard in stage.shards]
    first = Shard(names[0], (0, all_heads - heads), (0, all_ffn - ffn), (0, cut), (0, cut))
    last = Shard(names[1], (all_heads - heads, all_heads), (all_ffn - ffn, all_ffn), (cut, vocab), (cut, vocab))
    plan = structs.replace(
        prepared.plan, replicas=(structs.replace(replica, stages=(Stage(stage.layers, (first, last)),)),)
    )
    did = f"{heads} of {all_heads} heads and {ffn} of {all_ffn} columns for {last.device}"
    return Setting(written(setting, plan, folder), setting.requests), did


def move_layers(
    setting: Setting, prepared: Prepared, run: Rehearsal, finding: Finding | None, folder: Path
) -> tuple[Setting, str]:
    """`move 4 layers from stage 1 to stage 0`."""
    found = re.search(r"move (\d+) layers? from stage (\d) to stage (\d)", finding.remedy if finding else "")
    if found is None:
        return setting, "no remedy with a quantity"
    count, source, _ = map(int, found.groups())
    [replica] = prepared.plan.replicas
    a, b = replica.stages
    cut = a.layers[1] + (count if source == 1 else -count)
    stages = (structs.replace(a, layers=(0, cut)), structs.replace(b, layers=(cut, b.layers[1])))
    plan = structs.replace(prepared.plan, replicas=(structs.replace(replica, stages=stages),))
    return Setting(written(setting, plan, folder), setting.requests), f"layers {cut} and {b.layers[1] - cut}"


def more_kv(
    setting: Setting, prepared: Prepared, run: Rehearsal, finding: Finding | None, folder: Path
) -> tuple[Setting, str]:
    """`raise --kv-cache-memory: room for 2000 more tokens`."""
    found = re.search(r"room for (\d+) more tokens", finding.remedy if finding else "")
    if found is None:
        return setting, "no remedy with a quantity"
    have = prepared.kv_blocks[0] * 16 * prepared.model.kv_bytes_per_token()
    more = have + int(found.group(1)) * prepared.model.kv_bytes_per_token()
    options = structs.replace(setting.options, kv_cache_memory=f"{more}B")
    return Setting(
        options, setting.requests
    ), f"--kv-cache-memory {more / 2**20:.0f}MiB instead of {have / 2**20:.0f}MiB"


def route_by_work(
    setting: Setting, prepared: Prepared, run: Rehearsal, finding: Finding | None, folder: Path
) -> tuple[Setting, str]:
    """`--router least-work`."""
    return Setting(structs.replace(setting.options, router="least-work"), setting.requests), "--router least-work"


def pin_elsewhere(
    setting: Setting, prepared: Prepared, run: Rehearsal, finding: Finding | None, folder: Path
) -> tuple[Setting, str]:
    """`pin other processes elsewhere (taskset)`."""
    return Setting(setting.options, setting.requests, hog=1), "taskset: the other process on core 1"


def send_more(
    setting: Setting, prepared: Prepared, run: Rehearsal, finding: Finding | None, folder: Path
) -> tuple[Setting, str]:
    """`There is room for at least 3.1 times the traffic`."""
    found = re.search(r"room for at least ([\d.]+) times", verdict(run.account).bound)
    times = float(found.group(1)) if found else 1.0
    again = [structs.replace(r, arrival_s=r.arrival_s / times) for r in setting.requests]
    return Setting(setting.options, again), f"{times:.1f} times the traffic"


def cases() -> list[Planted]:
    """Sizes are such that each run takes about 20 s on a slow core."""
    burst = requests("requests=24,in=lognormal:120:0.6:16:400,out=lognormal:40:0.5:8:100")
    many = requests("requests=40,in=lognormal:120:0.6:16:400,out=lognormal:40:0.5:8:100")
    writing = requests("requests=64,in=8,out=lognormal:60:0.4:16:120")  # the head is on the last stage
    calm = requests("rate=0.4,requests=12,in=60,out=16")
    unlike = ("cpu:0", "cpu:1,slowdown=4")
    two = {"devices": ("cpu:0", "cpu:1")}
    return [
        Planted(
            "slowed rank (tp2, equal split)",
            Setting(make_options(devices=("cpu:0", "cpu:1,slowdown=2"), tensor_parallel_size=2, split="equal"), burst),
            (Cause.STRAGGLER,), "stage 0 of replica 0", resplit,
        ),
        Planted(
            "equal layers (pp2)", Setting(make_options(**two, pipeline_parallel_size=2, split="equal"), writing),
            (Cause.BUBBLE,), "replica 0", move_layers,
        ),
        Planted(
            "starved KV pool",
            Setting(make_options(devices=("cpu:0",), kv_cache_memory="32MiB", max_model_len=512), many),
            (Cause.KV_STARVED, Cause.RECOMPUTE), "replica 0", more_kv,
        ),
        Planted(
            "overloaded replica (round-robin, 1:4)",
            Setting(make_options(devices=unlike, data_parallel_size=2, router="round-robin", max_num_seqs=4), burst),
            (Cause.IMBALANCE,), "replica 0", route_by_work,
        ),
        Planted(
            "a client that eats a core", Setting(make_options(devices=("cpu:0",)), burst, hog=0),
            (Cause.CONTENDED,), "cpu:0", pin_elsewhere,
        ),
        Planted("idle server", Setting(make_options(devices=("cpu:0",)), calm), (Cause.NO_DEMAND,), "", send_more),
    ]  # fmt: skip


# ---- running ----------------------------------------------------------------------------------------------------


@contextmanager
def eating(core: int) -> Iterator[None]:
    """A process that never sleeps on that core, as a client with too much to do per token; -1: none."""
    if core < 0:
        yield
        return
    process = multiprocessing.get_context("fork").Process(target=_burn, args=(core,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _burn(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        sum(range(10_000))


def served(setting: Setting, live: bool) -> tuple[Prepared, Rehearsal, Verdict]:
    """One run."""
    prepared = prepare(setting.options)
    if live:
        with eating(setting.hog):
            run = run_live(prepared, setting.requests, warm_up_of(setting.requests, 4))
    else:
        run = simulate(prepared, setting.requests)
    if run.report.failed:
        raise SystemExit(f"{run.report.failed} requests failed: {run.report.failures}")
    hints = Hints(kv_bytes_per_token=prepared.model.kv_bytes_per_token())
    return prepared, run, verdict(run.account, hints)


def named(planted: Planted, said: Verdict) -> Finding | None:
    """The finding that names the loss, if there is one."""
    labels = {c.label for c in planted.causes}
    return next((f for f in said.findings if f.cause in labels and planted.where in f.where), None)


def measure(planted: Planted, rounds: int, folder: Path, live: bool) -> dict[str, Any]:
    """Plant, read the verdict, mend, serve again."""
    befores, afters = [], []
    mended, did, finding, words = planted.setting, "", None, ""
    account = None
    for k in range(rounds):
        print(f"{planted.name}: planted, round {k + 1} of {rounds}", file=sys.stderr, flush=True)
        prepared, run, said = served(planted.setting, live)
        befores.append(run)
        if k == 0:
            finding = named(planted, said)
            idle = Cause.NO_DEMAND in planted.causes
            found = finding is not None or (idle and "room for at least" in said.bound)
            words = said.bound if idle else finding.text if finding is not None else " ".join(said.text())
            mended, did = planted.mend(planted.setting, prepared, run, finding, folder)
            account = run.account
        print(f"{planted.name}: mended ({did}), round {k + 1} of {rounds}", file=sys.stderr, flush=True)
        afters.append(served(mended, live)[1])
    idle = Cause.NO_DEMAND in planted.causes
    pairs = [(_speed(b, idle), _speed(a, idle)) for b, a in zip(befores, afters, strict=True)]
    return {
        "name": planted.name, "named": found, "verdict": words, "remedy": did, "rank": _rank(finding, befores[0]),
        "before": median(b for b, _ in pairs), "after": median(a for _, a in pairs),
        "gain": median(a / b for b, a in pairs), "unit": "req/s" if idle else "output tok/s",
        "ttft_p90_ms": [befores[0].report.ttft_ms.p90, afters[0].report.ttft_ms.p90],
        "account": msgspec.to_builtins(account), "mended_account": msgspec.to_builtins(afters[0].account),
    }  # fmt: skip


def _speed(run: Rehearsal, idle: bool) -> float:
    return run.report.completed / run.report.duration_s if idle else run.report.output_tok_s


def _rank(finding: Finding | None, run: Rehearsal) -> int | None:
    """Place of the finding among all, 1 the largest loss."""
    if finding is None:
        return None
    return 1 + [f.cause for f in verdict(run.account).findings].index(finding.cause)


def straggler_check(result: dict[str, Any]) -> dict[str, float]:
    """Tensor parallel: the fast rank waits as much longer as the slow one computes (and is off its core) longer."""
    fast, slow = (result["account"]["devices"][d] for d in ("cpu:0", "cpu:1"))
    waited = fast["causes"]["straggler"] - slow["causes"]["straggler"]
    longer = slow["compute_s"] - fast["compute_s"]
    descheduled = slow["causes"]["contended"] - fast["causes"]["contended"]
    return {
        "straggler_s": waited, "extra_compute_s": longer, "extra_contended_s": descheduled,
        "to_compute": waited / longer, "to_both": waited / (longer + descheduled),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", help="run the losses whose names contain this")
    parser.add_argument("--simulate", action="store_true", help="rehearse without workers; nothing is saved")
    args = parser.parse_args(argv)
    chosen = [c for c in cases() if args.only is None or args.only in c.name]
    if args.simulate:
        chosen = [c for c in chosen if c.setting.hog < 0]  # a simulated core has no neighbours
    if not chosen:
        parser.error(f"--only {args.only!r}: losses are {', '.join(c.name for c in cases())}")
    results = []
    with TemporaryDirectory() as folder:
        for planted in chosen:
            results.append(measure(planted, args.rounds, Path(folder), not args.simulate))
    keys = ("name", "named", "verdict", "remedy", "unit", "before", "after", "gain")
    rows = [[("yes" if r[k] else "NO") if k == "named" else r[k] for k in keys] for r in results]
    print(markdown(["planted", "named", "the verdict", "done", "unit", "before", "after", "gain, x"], rows))
    figures: dict[str, Any] = {"rounds": args.rounds, "losses": results}
    for result in results:
        if result["name"].startswith("slowed rank"):
            check = figures["straggler_check"] = straggler_check(result)
            columns = ["cpu:0 waits longer, s", "cpu:1 computes longer, s", "is off its core longer, s",
                       "waits / computes", "waits / both"]  # fmt: skip
            print(markdown(columns, [list(check.values())]))
    if args.only is None and not args.simulate:
        save("planted_losses", figures)


if __name__ == "__main__":
    main()
