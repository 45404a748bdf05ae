"""What the benchmarks share: servers on free ports, loads, alternation, medians of ratios, tables, results.

Machines are shared and noisy, so configurations are compared side by side in one run: every round measures each of
them once, each round in another order, and what is quoted is the median over the rounds of the *ratio* to a baseline
measured in the same round.
"""

import datetime
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SHARED = Path(os.environ.get("EVENER_SHARED", ROOT.parent / "shared"))
"""Traces and peers' scripts, where there are any."""
EVENER = Path(sys.executable).with_name("evener")

T = TypeVar("T")


class BenchmarkFailed(Exception):
    """A server that does not come up, or a load that does not end as it should."""


@dataclass(frozen=True)
class Target:
    """A server to measure: running at `url`, or started by `command`, where `{port}` stands for its port."""

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    model: str = ""
    """Served name; empty: the server's first."""
    start_s: float = 180.0
    """How long it may take to come up."""

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Start the server if need be and stop it afterwards; yields its URL once /health answers 200."""
        if self.url:
            yield self.url.rstrip("/")
            return
        port = free_port()
        command = [part.replace("{port}", str(port)) for part in self.command]
        url = f"http://127.0.0.1:{port}"
        with tempfile.TemporaryFile("w+b") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
            try:
                wait_healthy(self.name, url, process, self.start_s)
                yield url
            except BaseException:
                log.seek(0)
                tail = log.read().decode(errors="replace").splitlines()[-25:]
                print(f"--- last output of {self.name}: {shlex.join(command)}", *tail, sep="\n", file=sys.stderr)
                raise
            finally:
                stop(process)


def evener(name: str, *flags: str, model: str | None = None) -> Target:
    """An `evener serve` with these flags; without a model, its default one."""
    return Target(name, (str(EVENER), "serve", *([model] if model else []), "--port", "{port}", *flags))


def peer(spec: str) -> Target:
    """`NAME=http://host:port` (running) or `NAME=command with {port}` (started here; may take ten minutes)."""
    name, equals, rest = spec.partition("=")
    if not equals or not name or not rest:
        raise SystemExit(f"--peer {spec!r}: write NAME=URL or NAME='command ... {{port}}'")
    if rest.startswith(("http://", "https://")):
        return Target(name, url=rest)
    if "{port}" not in rest:
        raise SystemExit(f"--peer {spec!r}: the command must take its port from {{port}}")
    return Target(name, tuple(shlex.split(rest)), start_s=600.0)


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_healthy(name: str, url: str, process: "subprocess.Popen[bytes]", limit_s: float) -> None:
    """Wait until /health answers 200. Raises BenchmarkFailed when the process ends first or takes too long."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        if process.poll() is not None:
            raise BenchmarkFailed(f"{name} ended with status {process.returncode} before it served")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise BenchmarkFailed(f"{name} did not answer {url}/health within {limit_s:g} s")


def stop(process: "subprocess.Popen[bytes]", grace_s: float = 40.0) -> None:
    """End a server and everything it started: asked first, killed after `grace_s`."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(grace_s)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} ignored SIGTERM for {grace_s:g} s and is killed", file=sys.stderr)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: what it left behind, if anything
    process.wait()


def load(url: str, *flags: str, model: str = "") -> dict[str, Any]:
    """Load a server; the figures of `bench`."""
    return bench("--url", url, *(("--model", model) if model else ()), *flags)


def bench(*flags: str) -> dict[str, Any]:
    """Run `evener bench --json` in a process of its own; its figures.

    Raises BenchmarkFailed when it fails or any request does: a comparison must not count unserved requests as fast.
    """
    command = [str(EVENER), "bench", "--json", "--no-progress", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        figures: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise BenchmarkFailed(f"{shlex.join(command)}\n{done.stdout}{done.stderr}") from None
    if done.returncode or figures["failed"] or figures["short_outputs"]:
        raise BenchmarkFailed(
            f"{figures['failed']} of {figures['requests']} requests failed, {figures['short_outputs']} were cut short: "
            f"{figures['failure_examples']}"
        )
    return figures


def alternate(
    targets: Sequence[Target], rounds: int, measure: Callable[[Target, str], T], keep: bool = False
) -> dict[str, list[T]]:
    """Measure every target once per round, each round beginning with the next one; name -> one result per round.

    Servers are started for each measurement, or all at once when `keep` (for slow starters; idle servers must then
    be idle).
    """
    results: dict[str, list[T]] = {t.name: [] for t in targets}
    assert len(results) == len(targets), "two targets share a name"
    with ExitStack() as stack:
        urls = {t.name: stack.enter_context(t.serving()) for t in targets} if keep else {}
        for k in range(rounds):
            shift = k % len(targets)
            for target in (*targets[shift:], *targets[:shift]):
                print(f"round {k + 1} of {rounds}: {target.name}", file=sys.stderr, flush=True)
                if keep:
                    results[target.name].append(measure(target, urls[target.name]))
                else:
                    with target.serving() as url:
                        results[target.name].append(measure(target, url))
    return results


def ratios(results: Mapping[str, Sequence[Mapping[str, Any]]], key: str, baseline: str) -> dict[str, float]:
    """Median over the rounds of figure / baseline's figure of the same round."""
    base = [r[key] for r in results[baseline]]
    return {n: median(r[key] / b for r, b in zip(rs, base, strict=True)) for n, rs in results.items()}


_tables: list[str] = []
"""Every table this script made: `save` writes them beside the figures, for docs/measurements.md."""


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns padded; floats with three significant digits or more."""
    cells = [list(headers), *([_shown(x) for x in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headers))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    _tables.append("\n".join(lines))
    return _tables[-1]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def save(name: str, figures: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json` with what is needed to read the figures later: machine, time, commit."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n\n".join(_tables) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return path


def machine() -> dict[str, Any]:
    """Processor, cores usable, system, Python, commit and time."""
    model = next(
        (
            x.split(":", 1)[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
