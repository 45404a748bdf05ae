"""What the scripts on speed share: steady loads of equal requests through an engine without a server."""

from itertools import count
from typing import Any

import numpy as np

from evener.api import Prepared, make_options, prepare
from evener.cost.rates import Rates
from evener.ledger.causes import Cause
from evener.workload.rehearse import Rehearsal, run_live
from evener.workload.requests import TimedRequest

LAYOUTS: dict[str, dict[str, Any]] = {
    "one core": {"devices": ("cpu:0",)},
    "one process": {"devices": ("cpu:0-1",)},
    "tp2": {"devices": ("cpu:0", "cpu:1"), "tensor_parallel_size": 2},
    "pp2": {"devices": ("cpu:0", "cpu:1"), "pipeline_parallel_size": 2},
    "dp2": {"devices": ("cpu:0", "cpu:1"), "data_parallel_size": 2},
    "tp2 x pp2": {
        "devices": ("cpu:0", "cpu:1", "cpu:0#1", "cpu:1#1"), "tensor_parallel_size": 2, "pipeline_parallel_size": 2,
    },
}  # fmt: skip

_seed = count(1)


def engine(layout: str, dtype: str, **more: Any) -> Prepared:
    """The layout, with room for what these scripts ask."""
    return prepare(make_options(dtype=dtype, max_queue=1 << 20, **LAYOUTS[layout], **more))


def equal(number: int, prompt: int, answer: int) -> list[TimedRequest]:
    """So many requests at once, of random tokens that no other call draws: no prefix is known."""
    draw = np.random.default_rng(next(_seed))
    tokens = draw.integers(100, 40_000, (number, prompt)).tolist()
    return [TimedRequest(k, 0.0, tokens[k], prompt, answer) for k in range(number)]


def run(prepared: Prepared, requests: list[TimedRequest]) -> Rehearsal:
    """Serve them, after a few to warm up. Raises where one failed."""
    done = run_live(prepared, requests, equal(4, 64, 4))
    assert done.report.failed == 0, done.report.failure_examples
    return done


def rates(prepared: Prepared) -> Rates:
    """What was measured of the first device, for as many as the plan uses."""
    profile = prepared.profile
    if profile.source == "default":
        names = " ".join(prepared.plan.devices())
        raise SystemExit(f"{names} not measured; run `evener devices --devices '{names}'` first")
    return profile.devices[0].rates(alone=len(prepared.plan.devices()) == 1)


def share_of(done: Rehearsal, cause: Cause) -> float:
    """Share of the devices' time with this cause, over all devices."""
    devices = done.account.devices.values()
    return sum(d.causes_ns[cause] for d in devices) / sum(d.wall_ns for d in devices)


def losses(done: Rehearsal, most: int = 3) -> str:
    """The largest shares of the devices' time, over all devices, useful or not."""
    shares = {c: share_of(done, c) for c in Cause}
    best = sorted(shares, key=lambda c: -shares[c])[:most]
    return ", ".join(f"{c.label} {100 * shares[c]:.1f}%" for c in best)


def weights(prepared: Prepared) -> tuple[int, int]:
    """Elements of all layers' matrices, and of the head."""
    m = prepared.model
    layer = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads) + 3 * m.hidden * m.ffn
    return m.layers * layer, m.vocab * m.hidden
