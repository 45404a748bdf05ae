"""Default plans: always valid, never unkind to the slow, and as quick as the best split by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from evener.cost.rates import DeviceProfile, Profile, default_profile, default_rates
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidDevice, InvalidPlan
from evener.plan.default import default_plan, equal_plan, mix_shape, split_by_time
from evener.spec.cluster import Cluster, Device, parse_device
from evener.spec.memory import MemoryConfig, kv_blocks
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Stage, intervals, size, validate
from evener.spec.traffic import TrafficMix, parse_traffic_mix
from evener.units import Bytes

SMOL = ModelSpec("llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, tied=True)
MIX = TrafficMix()


def named(*texts: str) -> list[Device]:
    return [parse_device(x) for x in texts]


def plan_of(tp: int, pp: int, dp: int, *texts: str, mix: TrafficMix = MIX, model: ModelSpec = SMOL) -> Plan:
    devices = named(*(texts or [f"cpu:{k}" for k in range(tp * pp * dp)]))
    return default_plan(model, devices, tp, pp, dp, default_profile(devices), mix)


def heads(plan: Plan, replica: int = 0, stage: int = 0) -> list[int]:
    return [size(sh.heads) for sh in plan.replicas[replica].stages[stage].shards]


def layers(plan: Plan, replica: int = 0) -> list[int]:
    return [size(st.layers) for st in plan.replicas[replica].stages]


# ---- splits by time -----------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.lists(st.floats(0.1, 100), min_size=1, max_size=4))
def test_no_split_of_whole_units_is_quicker(total: int, unit_ns: list[float]) -> None:
    got = [size(x) for x in split_by_time(total, unit_ns)]
    assert sum(got) == total
    slowest = max(n * t for n, t in zip(got, unit_ns, strict=True))
    for t in unit_ns:  # no part can take a unit more and still end before the slowest: so nothing else is quicker
        k = unit_ns.index(t)
        assert (got[k] + 1) * t >= slowest * (1 - 1e-12)
    for (n1, t1), (n2, t2) in itertools.permutations(zip(got, unit_ns, strict=True), 2):
        assert t1 <= t2 or n1 <= n2, "a slower device never gets more"


def test_known_splits() -> None:
    assert split_by_time(9, [1, 1]) == ((0, 5), (5, 9))
    assert split_by_time(9, [1, 10]) == ((0, 9), (9, 9)), "nine heads end before the slow one has done its first"
    assert split_by_time(100, [1, 3], 16) == ((0, 96), (96, 100)), "seven units, six and one, the last one short"


# ---- whole plans --------------------------------------------------------------------------------------------


@st.composite
def small_models(draw: st.DrawFn) -> ModelSpec:
    kv = draw(st.integers(1, 4))
    group, dim = draw(st.sampled_from([1, 32, 64])), draw(st.sampled_from([16, 64]))
    unit = group // min(group, dim)
    return ModelSpec(
        "llama", vocab=draw(st.integers(1, 3000)), hidden=32, layers=draw(st.integers(1, 12)),
        heads=kv * draw(st.integers(1, 4)) * unit, kv_heads=kv, head_dim=dim, ffn=group * draw(st.integers(1, 12)),
        max_position=64, tied=draw(st.booleans()), quant_group=group,
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(small_models(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_default_and_equal_plan_is_valid(
    model: ModelSpec, tp: int, pp: int, dp: int, data: st.DataObject
) -> None:
    slow = data.draw(st.lists(st.sampled_from([1, 1.5, 4, 50]), min_size=tp * pp * dp, max_size=tp * pp * dp))
    devices = named(*(f"cpu:{k},slowdown={s}" for k, s in enumerate(slow)))
    profile = default_profile(devices)
    if pp > model.layers:
        with pytest.raises(InvalidPlan, match=f"-pp {pp} needs a layer per stage, the model has {model.layers}"):
            default_plan(model, devices, tp, pp, dp, profile, MIX)
        return
    default = default_plan(model, devices, tp, pp, dp, profile, MIX)
    for plan in (default, equal_plan(model, devices, tp, pp, dp)):
        validate(plan, model, Cluster(tuple(devices)))
        assert plan.devices() == tuple(d.name for d in devices), "assigned in order"
        assert [len(r.stages) for r in plan.replicas] == [pp] * dp
    by_name = {d.name: d.slowdown for d in devices}
    for replica in default.replicas:
        for stage in replica.stages:
            for a, b in itertools.permutations(stage.shards, 2):
                if by_name[a.device] < by_name[b.device]:
                    assert size(a.heads) >= size(b.heads), "a slower device never gets more heads"
                    # the last unit of columns or rows may be short
                    assert size(a.ffn) + max(16, model.ffn_unit) > size(b.ffn)
                    assert size(a.head_rows) + 15 >= size(b.head_rows)


def test_nine_heads_over_equal_devices() -> None:
    assert [heads(plan_of(tp, 1, 1)) for tp in (1, 2, 3, 4)] == [[9], [5, 4], [3, 3, 3], [3, 2, 2, 2]]


def test_columns_are_not_tied_to_heads() -> None:
    (stage,) = plan_of(2, 1, 1).replicas[0].stages
    assert [sh.ffn for sh in stage.shards] == [(0, 768), (768, 1536)]
    assert [sh.head_rows for sh in stage.shards] == [(0, 24576), (24576, 49152)]
    assert all(sh.embed_rows == sh.head_rows for sh in stage.shards), "a tied matrix is held once"


def test_a_declared_slowdown_counts_in_full() -> None:
    plan = plan_of(2, 1, 1, "cpu:0,slowdown=2", "cpu:1")
    assert heads(plan) == [3, 6]
    assert [size(sh.ffn) for sh in plan.replicas[0].stages[0].shards] == [512, 1024]
    assert heads(plan_of(2, 1, 1, "cpu:0", "cpu:1,slowdown=20")) == [9, 0], "too slow to be worth one head"


def test_workers_that_share_a_core_count_as_half() -> None:
    assert heads(plan_of(3, 1, 1, "cpu:0", "cpu:0#1", "cpu:1")) == [2, 2, 5]


def measured(*speeds: float) -> tuple[list[Device], Profile]:
    devices = named(*(f"cpu:{k}" for k in range(len(speeds))))
    rows = []
    for d, speed in zip(devices, speeds, strict=True):
        r = default_rates(d)
        gemm = tuple(structs.replace(t, points=tuple((n, x * speed) for n, x in t.points)) for t in r.gemm)
        fast = structs.replace(
            r, gemm=gemm, read_bandwidth=r.read_bandwidth * speed, op_ns=r.op_ns / speed, attention=tuple(
                structs.replace(a, flops=a.flops * speed, bandwidth=a.bandwidth * speed) for a in r.attention
            ),
        )  # fmt: skip
        rows.append(DeviceProfile(d.name, "cpu", fast, fast, hardware=d.name))
    return devices, Profile(tuple(rows), (), "measured")


def test_measured_speed_decides_and_noise_does_not() -> None:
    devices, profile = measured(1.0, 2.0)
    assert heads(default_plan(SMOL, devices, 2, 1, 1, profile, MIX)) == [3, 6]
    devices, profile = measured(1.0, 1.06)
    plan = default_plan(SMOL, devices, 2, 1, 1, profile, MIX)
    assert heads(plan) == [5, 4]
    assert [size(sh.ffn) for sh in plan.replicas[0].stages[0].shards] == [768, 768]


def test_unlike_replicas() -> None:
    plan = plan_of(2, 1, 2, "cpu:0", "cpu:1,slowdown=2", "cpu:2", "cpu:3")
    assert (heads(plan, 0), heads(plan, 1)) == ([6, 3], [5, 4])


# ---- layers over stages -------------------------------------------------------------------------------------


def test_the_head_takes_layers_away_from_the_last_stage() -> None:
    decode = layers(plan_of(1, 2, 1, mix=parse_traffic_mix("in=16,out=500,rows=8")))
    prefill = layers(plan_of(1, 2, 1, mix=parse_traffic_mix("in=4000,out=10,rows=8")))
    assert decode[0] - decode[1] >= 6, f"the head costs several layers per sampled row: {decode}"
    assert abs(prefill[0] - prefill[1]) <= 1, f"few rows are sampled among long prompts: {prefill}"


@pytest.mark.parametrize("names", [("cpu:0", "cpu:1"), ("cpu:0,slowdown=3", "cpu:1"), ("cpu:0", "cpu:1,slowdown=1.7")])
@pytest.mark.parametrize("text", ["in=1020,out=129", "in=16,out=500,rows=8"])
def test_no_cut_makes_the_slowest_stage_quicker(names: tuple[str, ...], text: str) -> None:
    mix = parse_traffic_mix(text)
    devices = named(*names)
    profile = default_profile(devices)
    plan = default_plan(SMOL, devices, 1, 2, 1, profile, mix)
    shape = mix_shape(mix)

    def slowest(cut: int) -> int:
        first, second = plan.replicas[0].stages
        stages = (Stage((0, cut), first.shards), Stage((cut, 30), second.shards))
        return RooflineCostModel(SMOL, Plan((Replica(stages),)), profile).batch_ns(0, shape)

    got = layers(plan)[0]
    best = min(slowest(cut) for cut in range(1, 30))
    assert slowest(got) == pytest.approx(best, rel=1e-6)


def test_unequal_stages() -> None:
    got = layers(plan_of(1, 3, 1, "cpu:0", "cpu:1,slowdown=4", "cpu:2"))
    assert got[1] < got[2] <= got[0]
    assert 1 in layers(plan_of(1, 2, 1, "cpu:0", "cpu:1,slowdown=200")), "at least one layer each"


def test_layers_respect_declared_memory() -> None:
    config = MemoryConfig(max_batch_tokens=64)
    devices = named("cpu:0,memory=180MiB", "cpu:1")
    free = default_plan(SMOL, devices, 1, 2, 1, default_profile(devices), MIX)
    kept = default_plan(SMOL, devices, 1, 2, 1, default_profile(devices), MIX, memory=config)
    assert layers(kept)[0] < layers(free)[0]
    assert kv_blocks(kept.replicas[0], SMOL, Cluster(tuple(devices)), config, Bytes(1 << 30)) >= 1
    tight = named("cpu:0,memory=180MiB", "cpu:1,memory=200MiB")
    with pytest.raises(InvalidPlan, match=r"holds \d+ of 30 layers .*declare more memory"):
        default_plan(SMOL, tight, 1, 2, 1, default_profile(tight), MIX, memory=config)
    none = named("cpu:0,memory=20MiB", "cpu:1")
    with pytest.raises(InvalidPlan, match=r"cpu:0 \(stage 0\) declares 20.0 MiB but one layer needs"):
        default_plan(SMOL, none, 1, 2, 1, default_profile(none), MIX, memory=config)


# ---- refusals and the baseline ------------------------------------------------------------------------------


def test_too_few_devices_are_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidPlan, match=r"-tp 2 -pp 1 -dp 2 needs 4 devices, 2 are named.*--devices.*cpu:0#1"):
        plan_of(2, 1, 2, "cpu:0", "cpu:1")
    with pytest.raises(InvalidPlan, match=r"0 are named \(none\)"):
        equal_plan(SMOL, [], 1, 1, 1)
    with pytest.raises(InvalidPlan, match="-dp 0 must be at least 1"):
        equal_plan(SMOL, named("cpu:0"), 1, 1, 0)
    with pytest.raises(InvalidPlan, match="-pp 31 needs a layer per stage, the model has 30"):
        equal_plan(SMOL, named(*(f"cpu:{k}" for k in range(31))), 1, 31, 1)


def test_an_unmeasured_device_is_refused() -> None:
    with pytest.raises(InvalidDevice, match="evener devices --devices cpu:1"):
        default_plan(SMOL, named("cpu:0", "cpu:1"), 2, 1, 1, default_profile(named("cpu:0")), MIX)


def test_the_equal_plan_knows_no_speeds() -> None:
    plan = equal_plan(SMOL, named("cpu:0", "cpu:1,slowdown=9", "cpu:2", "cpu:3"), 2, 2, 1)
    assert layers(plan) == [15, 15]
    assert heads(plan) == heads(plan, stage=1) == [5, 4]
    first, second = plan.replicas[0].stages
    assert (
        [size(sh.embed_rows) for sh in first.shards] == [size(sh.head_rows) for sh in second.shards] == [24576, 24576]
    )
    assert not any(size(sh.head_rows) for sh in first.shards)


def test_mix_shape_by_hand() -> None:
    shape = mix_shape(TrafficMix(input_tokens=100, output_tokens=50, decode_rows=10, cached=0.5))
    assert (shape.prefill_tokens, shape.decode_rows, shape.chunks) == (10, 10, 1)
    assert shape.decode_context == 10 * 125
    assert shape.prefill_pairs == round(0.2 * (100**2 - 50**2) / 2)


def test_intervals_are_clipped() -> None:
    assert intervals([2, 0, 1], 40, 16) == ((0, 32), (32, 32), (32, 40))
