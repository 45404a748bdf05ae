"""Evener beside the engines that users would pick instead: W at once, one stream, Poisson arrivals, start-up, memory.

Each round starts every server once, in turn, and measures it over HTTP: one request alone (128 tokens in, 128 out),
workload W at once (see workload_w.py), W with Poisson arrivals at one rate for all, and at a share of what each
reached itself. Ratios are to the best peer of the same round, medians over the rounds. Files are in the system's cache
from the first round on, for all alike, and Evener's weights in its own, packed.

    benchmarks/peers.py --rounds 3 --peer 'vllm=vllm serve MODEL --port {port} --dtype bfloat16' \
        --peer 'llamacpp=llama-server -m MODEL.gguf --port {port} -np 32' --rate 1

An engine without a server is measured by a program of its own, `--script NAME='command'`: it runs the same workloads
in its process and prints one JSON object a line, of which the last counts, with the keys of `SCRIPT`.
"""

import argparse
import json
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import psutil

from common import RESULTS, BenchmarkFailed, Target, evener, free_port, load, markdown, peer, save, stop, wait_healthy
from workload_w import W, workload

ALONE = ("--requests", "3", "--concurrency", "1", "--input-tokens", "128", "--output-tokens", "128")
IDS = ("--token-ids", "100:40000")
SCRIPT = {
    "start_s": "startup_s",
    "alone_tok_s": "c_decode_tps",
    "alone_ttft_ms": "c_ttft_ms",
    "w_tok_s": "a_out_tps",
    "pss_mb": "peak_pss_mb",
    "own_req_s": "b_rate",
    **{f"own_{figure}_{p}": f"b_{figure}_{p}" for figure in ("ttft", "tpot") for p in ("p50", "p99")},
    "common_req_s": "r_rate",
    **{f"common_{figure}_{p}": f"r_{figure}_{p}" for figure in ("ttft", "tpot") for p in ("p50", "p99")},
}
"""Our name of a figure -> the one that a script prints (`--script`)."""
KEYS = (
    "start_s", "alone_tok_s", "alone_ttft_ms", "w_tok_s", "idle_pss_mb", "pss_mb", "common_req_s",
    "common_ttft_p50", "common_ttft_p99",
    "common_tpot_p50", "common_tpot_p99", "own_req_s", "own_ttft_p50", "own_ttft_p99", "own_tpot_p50", "own_tpot_p99",
)  # fmt: skip


RATIOS: dict[str, Callable[[list[float]], float]] = {
    "w_tok_s": max, "alone_tok_s": max, "alone_ttft_ms": min, "common_ttft_p50": min, "common_ttft_p99": min,
    "common_tpot_p50": min, "common_tpot_p99": min, "start_s": min, "pss_mb": min,
}  # fmt: skip
"""What is set beside the best peer, and what the best of them is."""


class Memory(threading.Thread):
    """Peak of the summed PSS of a process and all below it, MB, sampled twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._ended = pid, threading.Event()
        self.peak = 0.0

    def run(self) -> None:
        while not self._ended.wait(0.5):
            total = 0
            with suppress(psutil.Error):
                process = psutil.Process(self._pid)
                for p in (process, *process.children(recursive=True)):
                    with suppress(psutil.Error):
                        total += p.memory_full_info().pss
            self.peak = max(self.peak, total / 1e6)

    def end(self) -> float:
        self._ended.set()
        self.join()
        return self.peak


@contextmanager
def started(target: Target) -> Iterator[tuple[str, float, Memory]]:
    """The server running: its URL, the seconds it took to answer, and what watches its memory."""
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in target.command]
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    memory = Memory(process.pid)
    memory.start()
    try:
        wait_healthy(target.name, url, process, target.start_s)
        yield url, time.monotonic() - began, memory
    finally:
        memory.end()
        stop(process)


def measure(target: Target, rate: float | None, share: float) -> dict[str, Any]:
    """One round of one server."""
    with started(target) as (url, start_s, memory):
        time.sleep(1.5)
        idle_mb = memory.peak  # KV caches that are taken page by page hold nothing yet
        # W in full: what an engine prepares for shapes that it has not met yet is not its speed (vLLM: a third)
        load(url, *workload(0), model=target.model)
        alone = load(url, *ALONE, *IDS, "--seed", "1", model=target.model)
        at_once = load(url, *workload(1), model=target.model)
        found: dict[str, Any] = {
            "start_s": start_s,
            "alone_tok_s": 1000 / alone["tpot_ms"]["p50"],
            "alone_ttft_ms": alone["ttft_ms"]["p50"],
            "w_tok_s": at_once["output_tok_s"],
            "w_s": at_once["duration_s"],
            "client_cpu_s": at_once["client_cpu_s"],
            "idle_pss_mb": idle_mb,
        }
        own = share * at_once["requests"] / at_once["duration_s"]
        for name, at, seed in (("common", rate, "7"), ("own", own, "8")):  # other prompts: no prefix is known
            if at is None:
                continue
            got = load(url, *W, "--rate", str(at), "--seed", seed, model=target.model)
            found[f"{name}_req_s"] = at
            for figure in ("ttft", "tpot"):
                for p in ("p50", "p99"):
                    found[f"{name}_{figure}_{p}"] = got[f"{figure}_ms"][p]
        found["pss_mb"] = memory.end()
    return found


def by_script(command: str) -> dict[str, Any]:
    """What a program says of an engine without a server."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    for line in reversed(done.stdout.splitlines()):
        with suppress(json.JSONDecodeError):
            found = json.loads(line)
            if isinstance(found, dict):
                return {name: found[key] for name, key in SCRIPT.items() if key in found}
    raise BenchmarkFailed(f"{command} printed no figures\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="path; default: that of evener serve")
    parser.add_argument("--layout", action="append", default=[], help="NAME='flags of evener serve', repeatable")
    parser.add_argument("--peer", action="append", default=[], help="NAME='command ... {port}', repeatable")
    parser.add_argument("--script", action="append", default=[], help="NAME='command', for engines without a server")
    parser.add_argument("--rate", type=float, help="Poisson arrivals per second for all (none: not measured)")
    parser.add_argument("--share", type=float, default=0.6, help="of its own capacity: the other Poisson rate")
    parser.add_argument("--again", action="store_true", help="print the tables of the last run; measure nothing")
    args = parser.parse_args()
    if args.again:
        last = json.loads((RESULTS / "peers.json").read_text())
        last["ratio_to_best_peer"] = tables(last["rounds"], last["ours"])
        save("peers", last)
        return

    layouts = args.layout or ["evener int8=--devices 'cpu:0 cpu:1' -dp 2 --dtype int8"]
    ours = [evener(n, *shlex.split(f), model=args.model) for n, _, f in (x.partition("=") for x in layouts)]
    servers = ours + [peer(spec) for spec in args.peer]
    scripts = dict(spec.partition("=")[::2] for spec in args.script)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (*(t.name for t in servers), *scripts)}
    for k in range(args.rounds):
        for target in servers:
            print(f"round {k + 1}: {target.name}", flush=True)
            results[target.name].append(measure(target, args.rate, args.share))
            print(json.dumps(results[target.name][-1]), flush=True)  # a failure later does not lose it
        for name, command in scripts.items():
            print(f"round {k + 1}: {name}", flush=True)
            results[name].append(by_script(command))
            print(json.dumps(results[name][-1]), flush=True)

    commands = {t.name: shlex.join(t.command) for t in servers} | scripts
    figures: dict[str, Any] = {"ours": [t.name for t in ours], "commands": commands, "rounds": results}
    save("peers", figures)  # whatever the tables make of them
    save("peers", {**figures, "ratio_to_best_peer": tables(results, figures["ours"])})


def tables(results: dict[str, list[dict[str, Any]]], ours: list[str]) -> dict[str, dict[str, float]]:
    """Print the medians, and ours over the best peer's of the same round; gives the latter."""

    def typical(name: str, key: str) -> float | None:
        found = [r[key] for r in results[name] if r.get(key) is not None]
        return median(found) if found else None

    print(markdown(["engine", *KEYS], [[name, *(typical(name, k) for k in KEYS)] for name in results]))
    others = [name for name in results if name not in ours]
    ratio: dict[str, dict[str, float]] = {}
    for name in ours if others else []:
        ratio[name] = {}
        for key, best in RATIOS.items():
            rounds = []
            for k, mine in enumerate(results[name]):
                theirs = [x for o in others if (x := results[o][k].get(key)) is not None]
                if mine.get(key) is not None and theirs:
                    rounds.append(mine[key] / best(theirs))
            if rounds:
                ratio[name][key] = median(rounds)
    if ratio:
        keys = [key for key in RATIOS if all(key in r for r in ratio.values())]
        rows = [[name, *(r[key] for key in keys)] for name, r in ratio.items()]
        print(markdown(["engine", *(f"{key} x best peer" for key in keys)], rows))
    return ratio


if __name__ == "__main__":
    main()
