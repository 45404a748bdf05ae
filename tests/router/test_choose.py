"""Laws of routing, with a cost model whose speeds are plain to see."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.cost.base import BatchShape
from evener.errors import InvalidInput, Unavailable
from evener.router.choose import ROUTERS, LeastWork, ReplicaLoad, make_router, predict
from evener.router.lengths import LengthEstimator
from evener.units import Nanoseconds


class Speeds:
    """1 us per prompt token, 10 us per decoded row, 1 ns per key; times a factor per replica."""

    version = 1

    def __init__(self, *slower: float) -> None:
        self.slower = slower

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        ns = 1000 * shape.prefill_tokens + 10_000 * shape.decode_rows + shape.decode_context + shape.prefill_pairs // 10
        return Nanoseconds(round(ns * self.slower[replica]))

    latency_ns = batch_ns

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        return self.batch_ns(replica, shape)

    def error(self) -> float | None:
        return None


LOADS = st.builds(
    ReplicaLoad,
    replica=st.just(0),
    waiting_rows=st.integers(0, 50),
    running_rows=st.integers(0, 64),
    prefill_tokens_left=st.integers(0, 10_000),
    prefill_pairs_left=st.integers(0, 10**6),
    decode_tokens_left=st.floats(0, 10_000),
    context_tokens=st.integers(0, 50_000),
    kv_blocks=st.just(4000),
    kv_blocks_free=st.integers(0, 4000),
    cached_prefix_tokens=st.integers(0, 20).map(lambda k: 16 * k),
)


def number(loads: list[ReplicaLoad], alive: list[bool]) -> list[ReplicaLoad]:
    return [
        ReplicaLoad(**{f: getattr(x, f) for f in x.__struct_fields__} | {"replica": k, "alive": a})
        for k, (x, a) in enumerate(zip(loads, alive, strict=True))
    ]


def change(load: ReplicaLoad, **fields: object) -> ReplicaLoad:
    return ReplicaLoad(**{f: getattr(load, f) for f in load.__struct_fields__} | fields)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(LOADS, min_size=1, max_size=6), st.sampled_from(sorted(ROUTERS)))
def test_a_dead_replica_is_never_chosen(data, loads, name) -> None:
    alive = data.draw(st.lists(st.booleans(), min_size=len(loads), max_size=len(loads)))
    loads = number(loads, alive)
    router, costs = make_router(name), Speeds(*[1.0] * len(loads))
    for _ in range(len(loads) + 1):
        if any(alive):
            assert alive[router.choose(320, 50.0, loads, costs)]
        else:
            with pytest.raises(Unavailable, match=f"none of {len(loads)} replicas"):
                router.choose(320, 50.0, loads, costs)


def test_no_replica_at_all_is_an_error_with_a_remedy() -> None:
    for name in ROUTERS:
        with pytest.raises(Unavailable, match="restart the server"):
            make_router(name).choose(10, 10.0, [], Speeds())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="round-robin, least-requests, least-work"):
        make_router("fastest")


@settings(max_examples=80, deadline=None)
@given(
    LOADS,
    st.integers(321, 2000),
    st.floats(1, 3000),
    st.sampled_from(["prefill_tokens_left", "prefill_pairs_left", "decode_tokens_left", "context_tokens"]),
    st.integers(1, 5000),
)
def test_more_work_there_is_never_done_sooner(load, prompt_len, output, field, more) -> None:
    costs = Speeds(1.0)
    now = predict(prompt_len, output, load, costs)
    later = predict(prompt_len, output, change(load, **{field: getattr(load, field) + more}), costs)
    assert 0 <= now.done <= later.done
    assert 0 <= now.delay <= later.delay


@settings(max_examples=60, deadline=None)
@given(LOADS, st.integers(400, 2000), st.floats(1, 3000))
def test_speed_prefix_and_room_attract(load, prompt_len, output) -> None:
    """With equal work, the faster replica wins, then the one that has the prefix, then the one with KV room."""
    other = change(load, replica=1)
    assert LeastWork().choose(prompt_len, output, [load, other], Speeds(2.0, 1.0)) == 1
    cached = change(other, cached_prefix_tokens=load.cached_prefix_tokens + 64)
    assert LeastWork().choose(prompt_len, output, [load, cached], Speeds(1.0, 1.0)) == 1
    full = change(load, kv_blocks_free=0, decode_tokens_left=100.0, running_rows=20, waiting_rows=0)
    roomy = change(full, replica=1, kv_blocks_free=4000)
    assert LeastWork().choose(prompt_len, output, [full, roomy], Speeds(1.0, 1.0)) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(LOADS, min_size=1, max_size=8), st.integers(1, 2000), st.floats(0, 3000),
    st.lists(st.sampled_from([1.0, 1.1, 2.0]), min_size=8, max_size=8),
)  # fmt: skip
def test_leaving_replicas_out_by_a_bound_changes_no_choice(loads, prompt_len, output, slower) -> None:
    """The choice is the least of all whole predictions, though only those that may win are worked out."""
    costs = Speeds(*slower)
    loads = number(loads, [True] * len(loads))
    least = min(
        (sum(predict(prompt_len, output, x, costs)), x.prefill_tokens_left + x.decode_tokens_left, x.rows, x.replica)
        for x in loads
    )
    assert LeastWork().choose(prompt_len, output, loads, costs) == least[-1]
    left_out = [change(x, decode_tokens_left=0.0) for x in loads]
    asked: list[int] = []

    def decode_left(replica: int) -> float:
        asked.append(replica)
        return loads[replica].decode_tokens_left

    assert LeastWork().choose(prompt_len, output, left_out, costs, decode_left) == least[-1]
    assert len(loads) == 1 or least[-1] in asked


def test_ties_are_broken_by_number() -> None:
    loads = [ReplicaLoad(k, kv_blocks=100, kv_blocks_free=100) for k in (2, 0, 1)]
    assert LeastWork().choose(10, 5.0, loads, Speeds(1.0, 1.0, 1.0)) == 0
    assert make_router("least-requests").choose(10, 5.0, loads, Speeds(1.0, 1.0, 1.0)) == 0
    turn = make_router("round-robin")
    assert [turn.choose(10, 5.0, loads, Speeds()) for _ in range(5)] == [0, 1, 2, 0, 1]


def pile_up(slower: list[float], requests: int = 100) -> tuple[list[int], list[float]]:
    """Route requests of mixed lengths while nothing ends: (requests, work in tokens) per replica."""
    rng, costs, router = random.Random(4), Speeds(*slower), make_router("least-work")
    loads = [ReplicaLoad(r, kv_blocks=10**6, kv_blocks_free=10**6) for r in range(len(slower))]
    count, work = [0] * len(slower), [0.0] * len(slower)
    for _ in range(requests):
        prompt, output = rng.choice([20, 50, 1000]), rng.choice([10.0, 50.0, 400.0])
        r = router.choose(prompt, output, loads, costs)
        count[r] += 1
        work[r] += prompt / 10 + output
        at = loads[r]
        loads[r] = change(
            at,
            waiting_rows=at.waiting_rows + 1,
            prefill_tokens_left=at.prefill_tokens_left + prompt,
            decode_tokens_left=at.decode_tokens_left + output,
        )
    return count, work


def test_equal_replicas_share_evenly() -> None:
    _, work = pile_up([1.0, 1.0, 1.0])
    assert max(work) < 1.1 * min(work)


def test_a_replica_of_half_the_speed_gets_about_half_the_work() -> None:
    _, work = pile_up([1.0, 2.0])
    assert 0.4 < work[1] / work[0] < 0.6


def serve(name: str, slower: list[float], seed: int, gap_us: float, requests: int = 400) -> tuple[list[float], float]:
    """A small world: replicas compute a chunk and all their decoding rows round after round.

    One request in ten has a prompt, and one in ten an output, twenty times as long. Returns (ns busy, mean latency).
    """
    rng, costs, router, lengths = random.Random(seed), Speeds(*slower), make_router(name), LengthEstimator()
    arrivals, at = [], 0.0
    for _ in range(requests):
        at += rng.expovariate(1 / gap_us) * 1000
        times = [20 if rng.random() < 0.1 else 1 for _ in range(2)]
        arrivals.append((at, rng.randrange(20, 60) * times[0], rng.randrange(5, 30) * times[1]))
    rows: list[list[list[float]]] = [[] for _ in slower]
    """Per replica, requests as [prompt tokens left, output tokens left, output so far, arrival]."""
    free_at, busy, latency = [0.0] * len(slower), [0.0] * len(slower), 0.0
    events = [(at, -1, k) for k, (at, _, _) in enumerate(arrivals)]
    heapq.heapify(events)

    def issue(r: int, now: float) -> None:
        if not rows[r] or free_at[r] > now:
            return
        slots = rows[r][:16]
        fresh = next((x for x in slots if x[0] > 0), None)
        decoding = [x for x in slots if x[0] == 0]
        chunk = int(min(fresh[0], 256)) if fresh else 0
        ns = costs.batch_ns(r, BatchShape(prefill_tokens=chunk, decode_rows=len(decoding))) + 50_000 * slower[r]
        busy[r] += ns
        free_at[r] = now + ns
        if fresh:
            fresh[0] -= chunk
        for x in decoding:
            x[1], x[2] = x[1] - 1, x[2] + 1
        heapq.heappush(events, (free_at[r], r, 0))

    while events:
        now, r, k = heapq.heappop(events)
        if r < 0:
            loads = [
                ReplicaLoad(
                    i,
                    waiting_rows=max(0, len(here) - 16),
                    running_rows=min(16, len(here)),
                    prefill_tokens_left=int(sum(x[0] for x in here)),
                    decode_tokens_left=sum(lengths.expected_remaining(int(x[2]), 600) for x in here),
                    max_rows=16,
                    kv_blocks=10**6,
                    kv_blocks_free=10**6,
                )
                for i, here in enumerate(rows)
            ]
            _, prompt, output = arrivals[k]
            r = router.choose(prompt, lengths.expected_remaining(0, 600), loads, costs)
            rows[r].append([prompt, output, 0, now])
        else:
            for x in [x for x in rows[r] if x[1] <= 0]:
                rows[r].remove(x)
                lengths.observe(int(x[2]), censored=False)
                latency += now - x[3]
        issue(r, now)
    assert not any(rows)
    return busy, latency / len(arrivals)


def test_on_unlike_replicas_least_work_answers_sooner_than_the_baselines() -> None:
    mean = {name: sum(serve(name, [1.0, 1.0, 3.0], seed, 500)[1] for seed in range(4)) for name in ROUTERS}
    assert mean["least-work"] < 0.97 * mean["least-requests"]
    assert mean["least-work"] < 0.8 * mean["round-robin"]


def test_on_equal_replicas_least_work_is_no_worse_than_counting() -> None:
    mean = {name: sum(serve(name, [1.0, 1.0], seed, 800)[1] for seed in range(4)) for name in ROUTERS}
    assert mean["least-work"] < 1.02 * mean["least-requests"]
    assert mean["least-work"] < mean["round-robin"]


def test_the_same_calls_give_the_same_choices() -> None:
    assert serve("least-work", [1.0, 2.0], 7, 600, 100) == serve("least-work", [1.0, 2.0], 7, 600, 100)
