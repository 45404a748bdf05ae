"""Writes docs/challenges.md: each strategy, what live traffic does to it, the cause that shows it, a figure from a run.

The figures come from `results/*.json`, which the scripts in `benchmarks/` write; where there is no such file, the page
keeps the figure that it has. `--check` exits 1 if the page is not up to date, figures aside.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evener.ledger.causes import Cause

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
TARGET = Path(__file__).parent / "challenges.md"

FIGURE = "- Figure: "
Figure = Callable[[dict[str, Any]], str]
"""From the results of one benchmark to a sentence."""


@dataclass(frozen=True)
class Challenge:
    """One row of the page."""

    strategy: str
    habit: str
    """What pre-training does."""
    challenge: str
    """What live traffic makes of it."""
    causes: tuple[Cause, ...]
    answer: str
    """What Evener does."""
    benchmark: str
    figure: Figure | None
    """None: this version does not do it."""
    picture: str = ""
    """In docs/images."""


def share(account: dict[str, Any], *causes: Cause) -> float:
    """Part of all device time, percent."""
    total = account["total"]
    return 100 * sum(total["causes"][c.label] for c in causes) / total["wall_s"]


def planted(name: str, *causes: Cause) -> Figure:
    """What became of one planted loss."""

    def figure(results: dict[str, Any]) -> str:
        loss = next(x for x in results["losses"] if x["name"].startswith(name))
        before, after = share(loss["account"], *causes), share(loss["mended_account"], *causes)
        named = "The verdict names it" if loss["named"] else "The verdict does NOT name it"
        return (
            f"{loss['name']}: {before:.0f}% of the device time, {after:.0f}% after the remedy ({loss['remedy']}). "
            f"{named}; {loss['before']:.1f} {loss['unit']} became {loss['after']:.1f}, {loss['gain']:.2f} times."
            + (" The remedy did not help in this run." if loss["gain"] < 1.02 else "")
        )

    return figure


def straggler(results: dict[str, Any]) -> str:
    """The planted straggler, and whether the ledger's two sides agree."""
    check = results["straggler_check"]
    return (
        f"{planted('slowed rank', Cause.STRAGGLER)(results)} The fast rank waits {check['straggler_s']:.1f} s longer "
        f"in collectives, the slow one computes {check['extra_compute_s']:.1f} s longer (and is off its core "
        f"{check['extra_contended_s']:+.1f} s): {check['to_compute']:.2f} of it, {check['to_both']:.2f} of both."
    )


def padding(results: dict[str, Any]) -> str:
    """Static against continuous batches."""
    static, continuous, evener = results["cases"]
    return (
        f"Static batches: {share(static['account'], Cause.PADDING):.0f}% of the device time is padding, "
        f"{share(static['account'], Cause.PREFILL, Cause.DECODE):.0f}% useful, {static['report']['output_tok_s']:.0f} "
        f"output tok/s; continuous batches on the same shards {continuous['report']['output_tok_s']:.0f}, Evener "
        f"{evener['report']['output_tok_s']:.0f}."
    )


def room(results: dict[str, Any]) -> str:
    """The idle server."""
    loss = next(x for x in results["losses"] if x["name"] == "idle server")
    idle = share(loss["account"], Cause.NO_DEMAND)
    return (
        f'Idle {idle:.0f}% of the time: "{loss["verdict"]}" With {loss["remedy"]} it served {loss["gain"]:.1f} times '
        f"as many requests per second, at a p90 TTFT of {loss['ttft_p90_ms'][1]:.0f} ms instead of "
        f"{loss['ttft_p90_ms'][0]:.0f}."
    )


def collectives(results: dict[str, Any]) -> str:
    """Time in collectives after all had arrived, in Evener's run."""
    evener = results["cases"][-1]["account"]
    links = [x for x in evener["links"] if x["op"] == "all_reduce"]
    small = [x for x in links if x["rows"] in ("1", "2-4", "5-16", "17-64")]
    said = f"Evener's run spends {share(evener, Cause.TRANSFER):.1f}% of the device time in transfer"
    if not small:
        return f"{said}; no batch had 64 rows or fewer."
    count, moving = sum(x["count"] for x in small), sum(x["moving_s"] for x in small)
    waited = sum(x["waited_s"] for x in small)
    return (
        f"{said}. In batches of up to 64 rows an all-reduce waited {1e6 * waited / count:.0f} us for the last one "
        f"and then took {1e6 * moving / count:.0f} us."
    )


def together(results: dict[str, Any]) -> str:
    """What each challenge of the factorial run adds alone, and all of them."""
    found = results["results"]
    none, every = found["none"], found[max(found, key=lambda name: name.count("+"))]
    singles = {name: r for name, r in found.items() if "+" not in name and name != "none"}
    lost = ", ".join(f"{name} {100 * r['lost']:.0f}%" for name, r in singles.items())
    longer = every["mean_e2e_ms"] / none["mean_e2e_ms"]
    added = none["lost"] + sum(r["lost"] - none["lost"] for r in singles.values())
    return (
        f"Of the device time while there is work, {100 * none['lost']:.0f}% is lost with none of them; {lost}; with "
        f"all {100 * every['lost']:.0f}% ({100 * added:.0f}% if the single effects added up: who waits for one does "
        f"not wait for another). The mean time to the last token grows {longer:.1f} times. "
        "Simulated; two corners live: `benchmarks/compounding_live.py`."
    )


CHALLENGES = (
    Challenge(
        "Data parallel", "Equal shards of a fixed batch, in lockstep.",
        "Answers differ a hundredfold in length and devices in speed: one replica has a queue while another idles.",
        (Cause.IMBALANCE,), "Routes by predicted seconds of work left; an idle replica takes over waiting requests.",
        "planted_losses", planted("overloaded replica", Cause.IMBALANCE, Cause.NO_DEMAND),
    ),
    Challenge(
        "Tensor parallel", "An equal split, as devices are equal.",
        "In every layer all wait for the slowest rank; a profiler sees all ranks busy equally long.",
        (Cause.STRAGGLER,),
        "Stamps arrivals in collectives: who waits is told apart from who is late; splits heads and columns by speed.",
        "planted_losses", straggler,
    ),
    Challenge(
        "Tensor parallel", "The all-reduce hides behind a large batch.",
        "Decode batches are small: two collectives a layer, each as long as its latency.",
        (Cause.TRANSFER,), "Collectives over shared memory; the ledger gives bytes and seconds by batch size.",
        "first_figure", collectives,
    ),
    Challenge(
        "Pipeline parallel", "Equal layers per stage, fixed microbatches.",
        "Embedding, head and unlike devices unbalance the stages; the faster ones wait.",
        (Cause.BUBBLE,),
        "Layers are split by time for the stated traffic; beside decoding rows prompts go in small, equal chunks.",
        "planted_losses", planted("equal layers", Cause.BUBBLE),
    ),
    Challenge(
        "Sequence parallel", "Always on.", "Only some prompts are long.", (Cause.TRANSFER,), "Not in this version.",
        "", None,
    ),
    Challenge(
        "Expert parallel", "An auxiliary loss keeps experts even.", "Expert load is skewed and drifts.",
        (Cause.STRAGGLER,), "Not in this version.", "", None,
    ),
    Challenge(
        "Batching", "Batches padded to their longest prompt, run to their longest answer.",
        "Most of the batch is padding, and everybody waits for the longest.", (Cause.PADDING, Cause.HELD),
        "Continuous batching, chunked prefill, paged KV.", "first_figure", padding,
    ),
    Challenge(
        "KV memory", "None: training keeps no KV.",
        "Requests wait for blocks, or lose theirs and are computed again; devices idle for no visible reason.",
        (Cause.KV_STARVED, Cause.RECOMPUTE), "Tells both, and how many tokens of KV would have let the waiting in.",
        "planted_losses", planted("starved KV pool", Cause.KV_STARVED, Cause.RECOMPUTE),
    ),
    Challenge(
        "Sharing a host", "A cluster of one's own.",
        "The client, or a neighbour, takes the worker's core; compute just seems slow.",
        (Cause.CONTENDED,), "Reads from the kernel when a worker had work and got no core.",
        "planted_losses", planted("a client that eats a core", Cause.CONTENDED),
    ),
    Challenge(
        "Sizing", "The job fills the machine.", "Traffic comes and goes: is an idle device too much, or a reserve?",
        (Cause.NO_DEMAND,), "Sets idle time apart from every loss, and says how much more traffic there is room for.",
        "planted_losses", room,
    ),
    Challenge(
        "All of them at once", "Equal batches on equal devices: none of them.",
        "Lengths vary, requests come in bursts, devices and links are unlike, all at the same time.",
        (Cause.BUBBLE, Cause.STRAGGLER, Cause.TRANSFER),
        "The simulator tells what each adds to a plan, alone and together.", "compounding", together, "compounding.png",
    ),
)  # fmt: skip


def load(benchmark: str) -> dict[str, Any] | None:
    """The results of a benchmark, if it has run."""
    path = RESULTS / f"{benchmark}.json"
    return json.loads(path.read_text()) if path.exists() else None


def figure_of(row: Challenge) -> str:
    """The sentence, or what to run to get one."""
    assert row.figure is not None
    results = load(row.benchmark)
    return row.figure(results) if results is not None else f"not measured yet: run `benchmarks/{row.benchmark}.py`"


def measured_on(benchmark: str) -> str:
    """On which machine, and when; nothing where there are no results."""
    results = load(benchmark)
    if results is None:
        return ""
    machine = results["machine"]
    return f"; {machine['cpu']}, {machine['cores']} cores, {machine['when'][:10]}"


def present() -> dict[str, str]:
    """Heading -> figure, as the page has them now."""
    page = TARGET.read_text() if TARGET.exists() else ""
    return {part.partition("\n")[0]: part.partition(FIGURE)[2].partition("\n")[0] for part in page.split("\n## ")[1:]}


def text() -> str:
    """The whole page."""
    kept = present()
    out = [
        "# Challenges, causes, figures",
        "",
        "Written by `python docs/make_challenges.py` from `results/`. The causes are the ledger's: every device-second",
        "has exactly one. The machines are shared and noisy: read shares and ratios, not single figures.",
        "",
    ]
    for row in CHALLENGES:
        heading = f"{row.strategy}: {', '.join(f'`{c.label}`' for c in row.causes)}"
        figure = "none"
        if row.figure is not None:
            figure = f"{figure_of(row)} (`benchmarks/{row.benchmark}.py`{measured_on(row.benchmark)})"
            if load(row.benchmark) is None:
                figure = kept.get(heading, figure)
        out += [
            f"## {heading}",
            "",
            f"- Habit from pre-training: {row.habit}",
            f"- Live traffic: {row.challenge}",
            f"- Evener: {row.answer}",
            f"{FIGURE}{figure}",
            "",
        ]
        out += [f"![{row.strategy}](images/{row.picture})", ""] if row.picture else []
    return "\n".join(out).rstrip() + "\n"


def without_figures(page: str) -> list[str]:
    """What must be current also where nothing was measured."""
    return [line for line in page.splitlines() if not line.startswith(FIGURE)]


if __name__ == "__main__":
    if "--check" in sys.argv:
        current = TARGET.exists() and without_figures(TARGET.read_text()) == without_figures(text())
        sys.exit(0 if current else "docs/challenges.md is out of date: run python docs/make_challenges.py")
    TARGET.write_text(text())
