"""The search: as good as trying everything, within memory, never harmed by a better device, the same every time."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from tests.plan.problems import TINY, Situation, best_of_all, make_problem, random_situation, with_slowdown

from evener.cost.rates import DeviceProfile, default_profile
from evener.errors import InvalidPlan
from evener.plan.default import equal_plan
from evener.plan.few import ordered_groups
from evener.plan.more import like_devices, only, with_more
from evener.plan.pipeline import build_replica, deal_layers
from evener.plan.problem import Problem
from evener.plan.search import Scored, describe_shape, host_excess, score, search
from evener.plan.stages import Stages
from evener.spec.cluster import Cluster, parse_device
from evener.spec.memory import kv_blocks
from evener.spec.plan import size, validate
from evener.units import Bytes

seeds = st.integers(0, 100_000)
few = settings(max_examples=15, deadline=None)


def best(problem: Problem) -> Scored | None:
    try:
        return search(problem)[0]
    except InvalidPlan:
        return None


@pytest.mark.parametrize("seed", range(24))
def test_as_good_as_trying_everything(seed: int) -> None:
    problem = make_problem(random_situation(random.Random(seed), 4))
    found, everything = best(problem), best_of_all(problem)
    assert (found.load.requests_s if found else 0.0) >= everything * (1 - 1e-9)


@few
@given(seeds, st.integers(2, 7))
def test_every_plan_is_valid_and_within_memory(seed: int, devices: int) -> None:
    problem = make_problem(random_situation(random.Random(seed), devices))
    try:
        found = search(problem)
    except InvalidPlan:
        return
    for s in found:
        validate(s.plan, problem.model, problem.cluster)
        for replica, capacity in zip(s.plan.replicas, s.load.replicas, strict=True):
            blocks = kv_blocks(replica, problem.model, problem.cluster, problem.memory, problem.kv_bytes)
            assert problem.least_blocks() <= capacity.blocks <= blocks
        assert s.load == score(problem, s.plan).load


@few
@given(seeds)
def test_a_device_more_or_a_faster_one_never_harms(seed: int) -> None:
    check_that_more_never_harms(seed)


@pytest.mark.parametrize("seed", [81093, 68584, 24154, 12902, 3252, 76139, 89880, 38856, 49330, 145])
def test_a_faster_device_whose_part_by_speed_does_not_suit(seed: int) -> None:
    """Where memory or whole heads bound a split, a part other than the speed says serves more: the search finds it."""
    check_that_more_never_harms(seed)


def check_that_more_never_harms(seed: int) -> None:
    rng = random.Random(seed)
    problem = make_problem(random_situation(rng, 4))
    names = [d.name for d in problem.cluster.devices]
    now = best(problem)
    fewer = best(only(problem, names[:-1]))
    if fewer is not None:
        assert now is not None and now.load.requests_s >= fewer.load.requests_s * (1 - 1e-9)
    index = rng.randrange(len(names))
    device = problem.cluster.devices[index]
    if now is not None and device.slowdown > 1:
        faster = best(with_slowdown(problem, index, 1 + (device.slowdown - 1) / 2))
        # Whole heads and layers move in steps: a part that suited the old speed exactly may not suit the new one, the
        # more so where memory allows only some splits.
        slack = 0.99 if device.memory is None else 0.9
        assert faster is not None and faster.load.requests_s >= now.load.requests_s * slack


@few
@given(seeds)
def test_the_same_problem_gives_the_same_plans(seed: int) -> None:
    situation = random_situation(random.Random(seed), 5)
    one, two = best(make_problem(situation)), best(make_problem(situation))
    assert one == two


def test_what_fits_no_device_alone_is_served_over_several() -> None:
    small = Situation((1.0, 1.0, 1.0), (1_500_000,) * 3, 64, 32, 4)
    with pytest.raises(InvalidPlan, match="bytes short"):
        search(only(make_problem(small), ["cpu:0"]))
    found = search(make_problem(small))[0]
    assert all(len(r.devices()) > 1 for r in found.plan.replicas)


def test_what_cannot_fit_is_refused_with_the_shortage() -> None:
    problem = make_problem(Situation((1.0, 1.0), (300_000, 300_000), 64, 32, 4))
    with pytest.raises(
        InvalidPlan, match=r"needs weights .* devices declare .*: (\d+) bytes short; add memory"
    ) as caught:
        search(problem)
    short = int(str(caught.value).split(": ")[-1].split(" bytes")[0])
    assert short > 0


def test_kv_that_cannot_hold_one_request_is_refused() -> None:
    problem = make_problem(Situation((1.0,), (None,), 900, 124, 4))
    with pytest.raises(InvalidPlan, match="the KV of the longest request"):
        search(problem)


def test_a_device_that_only_slows_the_others_is_left_out() -> None:
    problem = make_problem(Situation((1.0, 1.0, 500.0), (2_000_000,) * 3, 8, 32, 16))
    found = search(problem)[0]
    assert "cpu:2" not in found.plan.devices()


def test_little_memory_moves_layers() -> None:
    """Equal speeds: with equal memory the layers are about halved, with unequal memory they go where it is."""

    def layers(*memories: int) -> dict[str, int]:
        problem = make_problem(Situation((1.0, 1.0), memories, 64, 200, 16))
        stages = Stages(problem, problem.cluster.devices)
        built = [
            build_replica(problem, stages, order) for order in ([("cpu:0",), ("cpu:1",)], [("cpu:1",), ("cpu:0",)])
        ]
        best = max((c for c in built if c is not None), key=lambda c: c.capacity.requests_s)
        return {st.shards[0].device: size(st.layers) for st in best.replica.stages}

    assert set(layers(1_800_000, 1_800_000).values()) <= {2, 3, 4}, "the head is worth about a layer"
    assert layers(1_300_000, 2_200_000) == {"cpu:0": 1, "cpu:1": 5}


@few
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_no_deal_of_layers_is_quicker(total: int, stages: list[tuple[int, int, int]]) -> None:
    fixed, per, most = zip(*stages, strict=True)
    got = deal_layers(total, fixed, per, most)

    def every(left: int, k: int) -> list[tuple[int, ...]]:
        if k == len(most):
            return [()] if left == 0 else []
        return [(n, *rest) for n in range(1, min(most[k], left) + 1) for rest in every(left - n, k + 1)]

    choices = every(total, 0)
    assert (got is None) == (not choices)
    if got is not None:

        def slowest(layers: tuple[int, ...]) -> int:
            return max(f + n * p for f, n, p in zip(fixed, layers, per, strict=True))

        assert tuple(got) in choices and slowest(tuple(got)) == min(map(slowest, choices))


def test_numbers_of_ordered_partitions() -> None:
    assert [sum(1 for _ in ordered_groups("abcde"[:n])) for n in range(1, 6)] == [1, 3, 13, 75, 541]


def test_many_devices_use_every_kind() -> None:
    """Twelve devices of three kinds: as good as the few-device search on the fastest five, and better for the rest."""
    problem = make_problem(Situation((1.0,) * 4 + (2.0,) * 4 + (4.0,) * 4, (2_000_000,) * 12, 64, 32, 16))
    found = search(problem)[0]
    five = search(only(problem, [f"cpu:{k}" for k in range(5)]))[0]
    assert found.load.requests_s > 1.5 * five.load.requests_s
    assert len(found.plan.devices()) >= 10
    again = search(problem)[0]
    assert again == found


def test_measured_devices_that_differ_by_noise_are_of_one_kind() -> None:
    """Sixteen cores of one host, each measured a little differently: they form tensor-parallel groups, in seconds."""
    problem = make_problem(Situation((1.0,) * 16, (1_200_000,) * 16, 64, 32, 16), simple=False)
    rng = random.Random(3)

    def noisy(d: DeviceProfile) -> DeviceProfile:
        factor = rng.uniform(0.97, 1.03)
        gemm = tuple(structs.replace(t, points=tuple((n, r * factor) for n, r in t.points)) for t in d.alone.gemm)
        rates = structs.replace(d.alone, gemm=gemm)
        return structs.replace(d, alone=rates, together=rates)

    devices = tuple(noisy(d) for d in problem.profile.devices)
    problem = replace(problem, profile=structs.replace(problem.profile, devices=devices))
    assert len(like_devices(problem)) == 1
    stages = Stages(problem, problem.cluster.devices, nearly=True)
    assert set(stages.kind.values()) == {0} and len(set(Stages(problem, problem.cluster.devices).kind.values())) == 16
    found = search(problem)[0]
    assert len(found.plan.devices()) == 16
    assert any(len(s.shards) > 1 for scored in search(problem) for r in scored.plan.replicas for s in r.stages)


def test_a_stage_is_priced_by_who_shares_a_core() -> None:
    """Groups of the same kinds of workers, once on two cores and once on one: slowed ones that share wait."""
    devices = [parse_device(f"{n},slowdown=2") for n in ("cpu:0", "cpu:0#1", "cpu:1", "cpu:1#1")]
    problem = make_problem(Situation((1.0,) * 4, (None,) * 4, 64, 32, 8), simple=False)
    problem = replace(problem, cluster=Cluster(tuple(devices)), profile=default_profile(devices))
    shape = problem.demand.settled(8)

    def layer_ns(stages: Stages, *group: str) -> int:
        option = stages.option(group, first=False, last=True)
        assert option is not None
        return option.times(shape)[1]

    for first in (("cpu:0", "cpu:1"), ("cpu:0", "cpu:0#1")):  # whichever is priced first
        stages = Stages(problem, devices)
        layer_ns(stages, *first)
        assert layer_ns(stages, "cpu:0", "cpu:0#1") > 1.2 * layer_ns(stages, "cpu:0", "cpu:1")


def test_weights_count_where_no_memory_is_declared() -> None:
    """Two replicas of what takes more than half of the host are refused, tensor parallelism is not; what does not fit
    the host at all is refused with the shortage."""
    problem = make_problem(Situation((1.0, 1.0), (None, None), 64, 32, 4))
    one = host_excess(replace(problem, host_bytes=Bytes(0)), search(only(problem, ["cpu:0"]))[0].plan.replicas)
    tight = replace(problem, host_bytes=Bytes(one * 3 // 2))
    assert all(len(s.plan.replicas) == 1 for s in search(tight))
    with pytest.raises(InvalidPlan, match=r"workers of this host need \d+ bytes more"):
        score(tight, equal_plan(problem.model, problem.cluster.devices, 1, 1, 2))
    with pytest.raises(InvalidPlan, match=r"this host has .* free for the other 2: \d+ bytes short"):
        search(replace(problem, host_bytes=Bytes(one // 2)))


def test_more_devices_like_one_keep_its_figures() -> None:
    problem = make_problem(Situation((1.0, 2.0), (None, None), 64, 32, 4))
    larger = with_more(problem, {"cpu:1": 2})
    added = larger.cluster.devices[2:]
    assert [d.slowdown for d in added] == [2.0, 2.0] and len({d.name for d in larger.cluster.devices}) == 4
    assert search(larger)[0].load.requests_s >= search(problem)[0].load.requests_s


def test_names_say_the_shape() -> None:
    problem = make_problem(Situation((1.0,) * 4, (None,) * 4, 64, 32, 4))
    shapes = {describe_shape(s.plan.replicas) for s in search(problem)}
    assert "dp4" in shapes
    assert TINY.layers == 6


def test_where_time_counts_no_layout_of_like_replicas_is_predicted_to_be_quicker() -> None:
    """Of many devices too: what serves the most is not what serves a request soonest."""
    problem = make_problem(Situation((1.0,) * 8, (None,) * 8, 64, 32, 16))
    most = search(problem)[0].load.requests_s
    rate = most * 0.2
    problem = replace(problem, demand=structs.replace(problem.demand, rate=rate))
    found = min(s.load.e2e for s in search(problem))
    for tp, pp in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4), (1, 4)):
        plan = equal_plan(problem.model, problem.cluster.devices, tp, pp, 8 // (tp * pp))
        assert found <= score(problem, plan).load.e2e * 1.02, (tp, pp)
