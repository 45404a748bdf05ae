"""Hardware that is not at hand: predictions against what others measured.

Every row is predicted without any figure of its own but its workload:

    peaks           from published peaks and the shares of them that `evener.cost.published` assumes
    tables          from the measured operators of `aiconfigurator-core`, with the assumptions of `MissingTerms`
    tables + host   the same with the engine's host time, found on other rows: the rows of an engine are in two
                    parts, and what is found on one is shown for the other (Splitwise: one model for the other)

Assumed where a row is silent: the engine's limits and share of memory (`ENGINE` in validation_cases.py), and K and V
in the dtype that the engine takes by default.

    benchmarks/validation.py [--only splitwise]
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from msgspec import structs
from scipy import optimize

from common import SHARED, markdown, save
from evener.cost.tables import KERNELS_PER_LAYER, MissingTerms
from evener.errors import InvalidInput
from evener.units import NS_PER_S
from validation_cases import Case, Prediction, case_of, costs_by, predict, prompts

ALIKE = {"vllm 0.19.0": "vllm 0.12.0"}
"""Engines of which a single run was measured -> the engine whose host time they are given."""
HOWS = ("peaks", "tables", "tables + host")


class Result(NamedTuple):
    """One prediction beside its row."""

    case: Case
    how: str
    got: Prediction
    truth: Prediction

    @property
    def off(self) -> Prediction:
        """Relative errors."""
        return Prediction(*(p / t - 1 for p, t in zip(self.got, self.truth, strict=True)))

    @property
    def key(self) -> tuple[str, str, str]:
        """What medians are taken over."""
        return self.case.row["id"].partition(":")[0], self.case.row["gpu"], self.how


def truth_of(row: dict[str, str]) -> Prediction:
    """What was measured."""
    return Prediction(float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3, float(row["output_tok_s"]))


def engine_of(case: Case) -> str:
    """Rows of one engine share a host time; so do, where the host bounds every kernel, those of one machine."""
    backend = case.row["backend"].strip()
    return f"{backend}, {case.row['gpu']}" if case.row["id"].startswith("splitwise") else backend


def host_terms(results: Sequence[Result]) -> MissingTerms:
    """The host time that explains the decode steps of these rows: per batch and per row in flight. Where rows were
    measured one at a time (engines without graphs, whose host starts every kernel): per kernel instead."""
    terms = MissingTerms()
    rows = np.array([float(r.case.row["concurrency"]) for r in results])
    took = np.array([r.truth.tpot for r in results]) * 1e9
    device = np.array([r.got.tpot for r in results]) * 1e9
    kernels = np.array([KERNELS_PER_LAYER * r.case.model.layers for r in results])
    alone = rows == 1
    if alone.any():
        terms = structs.replace(terms, launch_ns=float(np.median((took / kernels)[alone])))
        device = np.maximum(device, kernels * terms.launch_ns)
        # What large prompts take beyond that is laid to the bytes of their all-reduces.
        large = [r for r in results if int(r.case.row["isl"]) * float(r.case.row["concurrency"]) >= LARGE_PROMPT]
        over = median((r.truth.ttft - r.got.ttft) / moving_s(r.case) for r in large)
        terms = structs.replace(terms, moving_factor=1.0 + max(0.0, over))
    # Least squares of the relative error of the step.
    ones = np.zeros(len(rows)) if alone.any() else np.ones(len(rows))
    per_batch, per_row = optimize.nnls(np.stack([ones, rows], axis=1) / took[:, None], (took - device) / took)[0]
    return structs.replace(terms, host_ns=terms.host_ns + round(per_batch), row_ns=terms.row_ns + float(per_row))


LARGE_PROMPT = 2048
"""Tokens at once from which on sizes count, not starts."""


def moving_s(case: Case) -> float:
    """Seconds of the first batch in which data moves."""
    return costs_by(case, "tables").shards_ns(0, 0, prompts(case))[0].transfer / NS_PER_S


def parts(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Two parts of an engine's rows: by model, or every other one."""
    models = sorted({r.case.row["model"] for r in results})
    if results[0].case.row["id"].startswith("splitwise") and len(models) == 2:
        return tuple([r for r in results if r.case.row["model"] == m] for m in models)  # type: ignore[return-value]
    ordered = sorted(results, key=lambda r: r.case.row["id"])
    return ordered[::2], ordered[1::2]


def with_host(by_tables: Sequence[Result]) -> tuple[list[Result], list[list[object]]]:
    """Every row once more, with the host time that other rows of its engine tell; and what was found."""
    engines: dict[str, list[Result]] = defaultdict(list)
    for r in by_tables:
        engines[engine_of(r.case)].append(r)
    out, found = [], list[list[object]]()

    def again(results: Sequence[Result], told_by: Sequence[Result], engine: str) -> None:
        terms = host_terms(told_by)
        found.append(
            [
                engine,
                len(told_by),
                len(results),
                terms.launch_ns / 1e3,
                terms.moving_factor,
                terms.host_ns / 1e6,
                terms.row_ns / 1e3,
            ]
        )
        for r in results:
            out.append(r._replace(how=HOWS[2], got=predict(r.case, costs_by(r.case, "tables", terms))))

    for engine, results in engines.items():
        if engine in ALIKE and ALIKE[engine] in engines:
            again(results, engines[ALIKE[engine]], f"{engine}, told by {ALIKE[engine]}")
        elif len(results) >= 4:
            one, other = parts(results)
            again(one, other, engine)
            again(other, one, engine)
    return out, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose id contains this")
    parser.add_argument("--file", type=Path, default=SHARED / "traces" / "validation.csv")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file} does not exist; give --file, or EVENER_SHARED")

    results: list[Result] = []
    left_out: dict[str, int] = defaultdict(int)
    for row in csv.DictReader(args.file.open(encoding="utf-8")):
        if args.only not in row["id"]:
            continue
        case = case_of(row)
        if isinstance(case, str):
            left_out[case] += 1
            continue
        for how in HOWS[:2]:
            try:
                results.append(Result(case, how, predict(case, costs_by(case, how)), truth_of(row)))
            except InvalidInput as error:
                left_out[f"{how}: {error.message.partition(';')[0]}"] += 1
        print(row["id"], file=sys.stderr, flush=True)
    more, found = with_host([r for r in results if r.how == "tables"])
    results += more

    by_key: dict[tuple[str, str, str], list[Prediction]] = defaultdict(list)
    for r in results:
        by_key[r.key].append(r.off)
    print("Median error, and in brackets the median of its size:\n")
    print(markdown(
        ["source", "GPU", "by", "rows", "TTFT", "TPOT", "output tok/s"],
        [[*key, len(offs), *(f"{median(o[k] for o in offs):+.0%} ({median(abs(o[k]) for o in offs):.0%})"
                             for k in range(3))]
         for key, offs in sorted(by_key.items(), key=lambda x: (*x[0][:2], HOWS.index(x[0][2])))],
    ))  # fmt: skip
    print("\nHost time as found on other rows of the same engine:\n")
    print(
        markdown(
            ["engine", "found on", "shown for", "us per kernel", "x all-reduce", "ms per batch", "us per row"], found
        )
    )
    print("\nEvery row, predicted / measured:\n")
    headers = ["source", "model", "GPU", "plan", "workload", "by", "TTFT ms", "TPOT ms", "output tok/s"]
    print(markdown(headers, [shown(r) for r in sorted(results, key=lambda r: (r.case.row["id"], HOWS.index(r.how)))]))
    for why, count in left_out.items():
        print(f"left out, {count} rows: {why}")
    figures = [{"id": r.case.row["id"], "by": r.how, "predicted": r.got._asdict(), "measured": r.truth._asdict()}
               for r in results]  # fmt: skip
    save("validation", {"rows": figures, "host": found, "left_out": dict(left_out)})


def shown(r: Result) -> list[object]:
    """A line of the table."""
    row = r.case.row
    work = f"{row['isl']}+{row['osl']} x {row['concurrency'] or 'trace'}"
    figures = [f"{scale * p:.4g} / {scale * t:.4g} ({o:+.0%})"
               for p, t, o, scale in zip(r.got, r.truth, r.off, (1e3, 1e3, 1), strict=True)]  # fmt: skip
    plan = f"tp{row['tp']} {r.case.dtype}"
    return [row["id"].partition(":")[0], row["model"].split("/")[-1], row["gpu"], plan, work, r.how, *figures]


if __name__ == "__main__":
    main()
