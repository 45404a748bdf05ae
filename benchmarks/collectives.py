"""Same-host collectives: a small all-reduce takes microseconds, and more ranks than cores do not collapse.

All-reduce of fp32 over shared memory and over Gloo, by size and ranks, in alternation in one run; ranks are processes,
pinned to the cores in turn. And a message through a shared-memory pipe: half of there and back.

    benchmarks/collectives.py [--rounds 5] [--ranks 2 3 4]

`call`: from entering to leaving, waits for late peers included; `transfer`: from the last rank's entry on, which only
shared memory knows. Microseconds; median and 90th percentile over all calls of all ranks. `gloo/shm`: median over the
rounds of the ratio of Gloo's median call to shared memory's.
"""

import argparse
import os
import sys
import time
from statistics import median, quantiles
from typing import Any

import msgspec
import torch

from common import markdown, save
from evener.execute.live.transport.base import Group, Stamp
from evener.execute.live.transport.layout import GroupSpec, PipeSpec, SegmentLayout
from evener.execute.live.transport.rendezvous import Rendezvous, TorchWorld
from evener.execute.live.transport.shm import Segment, ShmGroup, ShmPipe
from evener.execute.live.transport.torchdist import TorchGroup
from evener.units import human_bytes

# The hidden state of one row of a small model (576 fp32), of a few rows, of a prefill chunk.
SIZES = (2304, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)


class Series(msgspec.Struct):
    """Calls of one rank in one setting and round, nanoseconds."""

    transport: str
    nbytes: int
    round: int
    call: list[int]
    transfer: list[int]


def timed(group: Group, t: torch.Tensor, calls: int) -> list[Stamp]:
    stamps = []
    for _ in range(calls):
        stamps.append(group.all_reduce(t))
        t.fill_(1.0)
    return stamps


def rank_main(
    rank: int, devices: tuple[str, ...], segment: Segment, layout: SegmentLayout, port: int, rounds: int, budget: float
) -> list[Series]:
    """What one rank process measures: every size on both transports, round after round."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    pipes = (
        [ShmPipe(segment, p, "send" if i == rank else "recv") for i, p in enumerate(layout.pipes)] if rank < 2 else []
    )
    start = ShmGroup(segment, layout.groups[1], rank)
    groups: dict[str, Group] = {
        "shm": ShmGroup(segment, layout.groups[0], rank),
        "gloo": TorchGroup(TorchWorld("127.0.0.1", port, devices[rank], address="127.0.0.1"), "ranks", devices),
    }
    series = []
    for k in range(rounds):
        for nbytes in SIZES:
            t = torch.ones(nbytes // 4)
            for name, group in groups.items():
                # As many calls as fit the budget, agreed on by all ranks.
                begin = time.monotonic()
                timed(group, t, 3)
                calls = torch.tensor([budget / max(1e-6, (time.monotonic() - begin) / 3)])
                start.all_reduce(calls)
                stamps = timed(group, t, max(5, min(2000, int(calls) // len(devices))))
                call, transfer = [s.ended - s.entered for s in stamps], [s.ended - s.arrived for s in stamps]
                series.append(Series(name, nbytes, k, call, transfer if name == "shm" else []))
        if rank < 2:
            series.append(ping_pong(rank, k, pipes))
        start.all_reduce(torch.zeros(1))
    return series


def ping_pong(rank: int, k: int, pipes: list[ShmPipe]) -> Series:
    """Half the time there and back of one row's hidden state."""
    there, back = pipes
    t, one_way = torch.ones(SIZES[0] // 4), []
    for _ in range(300):
        begin = time.monotonic_ns()
        if rank == 0:
            there.send(t)
            back.recv(t)
        else:
            there.recv(t)
            back.send(t)
        one_way.append((time.monotonic_ns() - begin) // 2)
    return Series("pipe", SIZES[0], k, one_way if rank == 0 else [], [])


def measure(ranks: int, rounds: int, budget: float) -> list[Series]:
    """Fork the rank processes and collect what they measured."""
    devices = tuple(f"cpu:{r}" for r in range(ranks))
    pair = (PipeSpec(devices[0], devices[1]), PipeSpec(devices[1], devices[0]))
    layout = SegmentLayout.plan([GroupSpec(devices), GroupSpec(devices)], pair)
    segment = Segment.create(layout)
    read_port, write_port = os.pipe()
    outputs = []
    for rank in range(ranks):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                port = int.from_bytes(os.read(read_port, 4), "little")
                mine = rank_main(rank, devices, segment, layout, port, rounds, budget)
                with os.fdopen(writer, "wb") as f:
                    f.write(msgspec.json.encode(mine))
                os._exit(0)
            except BaseException as e:
                segment.abort(devices[rank], repr(e))
                print(f"rank {rank}: {e!r}", file=sys.stderr)
                os._exit(1)
        os.close(writer)
        outputs.append(reader)
    rendezvous = Rendezvous()  # threads start here, after the forks
    os.write(write_port, rendezvous.port.to_bytes(4, "little") * ranks)
    found: list[Series] = []
    for reader in outputs:
        with os.fdopen(reader, "rb") as f:
            data = f.read()
        if not data:
            segment.abort("benchmark", "a rank failed")
            sys.exit("a rank failed; see above")
        found += msgspec.json.decode(data, type=list[Series])
    for _ in range(ranks):
        os.wait()
    rendezvous.close()
    segment.close()
    os.close(read_port)
    os.close(write_port)
    return found


def summary(ranks: int, found: list[Series]) -> list[dict[str, Any]]:
    """One row for each size and transport."""

    def calls(transport: str, nbytes: int, k: int | None = None) -> list[float]:
        chosen = [s for s in found if (s.transport, s.nbytes) == (transport, nbytes) and k in (None, s.round)]
        return [x / 1e3 for s in chosen for x in s.call]

    rounds = sorted({s.round for s in found})
    rows = []
    for nbytes, transport in sorted({(s.nbytes, s.transport) for s in found}):
        call = calls(transport, nbytes)
        transfer = [x / 1e3 for s in found if (s.transport, s.nbytes) == (transport, nbytes) for x in s.transfer]
        ratio = None
        if transport == "shm":
            ratio = median(median(calls("gloo", nbytes, k)) / median(calls("shm", nbytes, k)) for k in rounds)
        rows.append(
            {
                "ranks": ranks,
                "bytes": nbytes,
                "transport": transport,
                "calls": len(call),
                "call_us_p50": median(call),
                "call_us_p90": quantiles(call, n=10)[-1],
                "transfer_us_p50": median(transfer) if transfer else None,
                "transfer_us_p90": quantiles(transfer, n=10)[-1] if transfer else None,
                "gloo_over_shm": ratio,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="2 or more; several are tried in turn")
    args = parser.parse_args()
    rows = [row for ranks in args.ranks for row in summary(ranks, measure(ranks, args.rounds, 0.1))]
    headers = ("ranks", "size", "transport", "call p50", "p90", "transfer p50", "p90", "gloo/shm")
    keys = ("call_us_p50", "call_us_p90", "transfer_us_p50", "transfer_us_p90", "gloo_over_shm")
    cells = [[r["ranks"], human_bytes(r["bytes"]), r["transport"], *(r[k] for k in keys)] for r in rows]
    print(markdown(headers, cells))
    save("collectives", {"rows": rows})


if __name__ == "__main__":
    main()
