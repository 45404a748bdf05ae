"""The choice: what is compared, the front, the usual layouts, verdicts, sizes, launch commands."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec import structs
from tests.plan.problems import TINY, Situation, make_problem

from evener.engine.policy import group_count
from evener.errors import InvalidInput, InvalidPlan
from evener.plan.assess import assess, parse_layout
from evener.plan.auto import choose_layout, spread_items
from evener.plan.baselines import equalised
from evener.plan.choose import best_tried, pareto
from evener.plan.emit import emit
from evener.plan.explain import binding, headline
from evener.plan.load import load_plan, save_plan
from evener.plan.more import one_more, with_more
from evener.plan.planner import as_json, choose_plan
from evener.plan.problem import Bounds, Item, Problem, demand_of
from evener.plan.search import Scored, score, search
from evener.plan.size import copies, size_for
from evener.plan.trial import sample, try_plan
from evener.spec.cluster import Cluster, Link
from evener.spec.links import Links
from evener.spec.plan import Plan, size, validate
from evener.spec.traffic import TrafficMix
from evener.units import Bytes, Seconds

UNLIKE = Situation((1.0, 2.0), (None, None), 64, 32, 8)


def under(problem: Problem, rate: float, bounds: Bounds | None = None) -> Problem:
    """The same problem with requests at even intervals."""
    items = tuple(Item(Seconds(k / rate), 64, 32) for k in range(60))
    return replace(problem, items=items, demand=demand_of(items, rate), bounds=bounds or Bounds())


def test_throughput_is_near_capacity_and_the_ledger_is_whole() -> None:
    problem = make_problem(UNLIKE)
    for scored in search(problem):
        tried = try_plan(problem, scored, sample(problem, sum(c.rows for c in scored.load.replicas), 200))
        assert tried.refused == 0 and tried.requests == 200
        assert tried.full_tokens_s == pytest.approx(tried.load.tokens_s, rel=0.25)
        for causes in tried.ledger.values():
            assert sum(causes.values()) == pytest.approx(1.0)


def test_the_choice_is_at_least_as_good_as_every_usual_layout() -> None:
    choice = choose_plan(make_problem(UNLIKE), requests=60)
    assert {b.name for b in choice.baselines} >= {"all TP, equal", "all PP, equal", "all DP, equal"}
    for t in choice.others:
        assert choice.best.full_tokens_s >= t.full_tokens_s * 0.994
    text = headline(choice)
    assert choice.best.plan.name in text and "tokens/s" in text
    assert json.loads(json.dumps(as_json(choice)))["plan"] == choice.best.plan.name


def test_under_a_rate_the_quickest_that_keeps_up_is_chosen() -> None:
    problem = make_problem(UNLIKE)
    capacity = search(problem)[0].load.requests_s
    calm = choose_plan(under(problem, capacity * 0.1), baselines=False)
    assert all(calm.best.e2e.mean <= t.e2e.mean for t in calm.others)
    busy = choose_plan(under(problem, capacity * 0.9), baselines=False)
    assert busy.best.load.requests_s >= capacity * 0.9


def test_a_queue_that_a_short_sample_does_not_show_counts() -> None:
    """Eight requests end before a queue has grown: plans that the cost model says cannot serve the rate are not
    chosen while another can."""
    problem = make_problem(Situation((1.0, 1.0), (None, None), 64, 32, 8))
    scored = search(problem)
    able = scored[0].load.requests_s
    quick = min(scored, key=lambda s: (s.load.requests_s > able * 0.97, s.load.requests_s))
    rate = (quick.load.requests_s + able) / 2
    busy = under(problem, rate)
    tried = [try_plan(busy, s, sample(busy, 1, 8)) for s in scored]
    fast = [structs.replace(t, e2e=structs.replace(t.e2e, mean=1e-9)) if t.load.requests_s < rate else t for t in tried]
    assert any(t.load.requests_s < rate for t in fast), "the test's own premise"
    assert best_tried(busy, fast).load.requests_s >= rate


def test_a_sample_that_does_not_fill_a_plan_does_not_rank_it() -> None:
    problem = make_problem(UNLIKE)
    tried = [try_plan(problem, s, problem.items[:3]) for s in search(problem)]
    assert not any(t.filled for t in tried)
    wrong = [structs.replace(t, full_tokens_s=1 / t.load.tokens_s) for t in tried]
    assert best_tried(problem, wrong).load.tokens_s == max(t.load.tokens_s for t in tried)


def test_goodput_counts_what_meets_the_bounds() -> None:
    problem = make_problem(UNLIKE)
    rate = search(problem)[0].load.requests_s * 0.5
    strict = choose_plan(under(problem, rate, Bounds(e2e=Seconds(1e-6))), baselines=False)
    assert strict.goal == "goodput" and strict.best.met == 0.0
    loose = choose_plan(under(problem, rate, Bounds(ttft=Seconds(1e3), tpot=Seconds(1e3))), baselines=False)
    assert loose.best.met == 1.0 and loose.best.goodput == pytest.approx(loose.best.requests_s)


def test_nobody_on_the_front_is_beaten() -> None:
    choice = choose_plan(make_problem(UNLIKE), requests=40)
    everything = [choice.best, *choice.others]
    assert choice.front and set(map(id, choice.front)) <= set(map(id, everything))
    capacities = [t.load.tokens_s for t in choice.front]
    assert all(a >= b for a, b in pairwise(capacities))
    for t in everything:
        beats = [
            f for f in choice.front
            if f.load.tokens_s >= t.load.tokens_s and f.ttft.p90 <= t.ttft.p90
            and f.tpot.p90 <= t.tpot.p90 and f.memory <= t.memory
        ]  # fmt: skip
        assert beats, f"{t.plan.name} is neither on the front nor beaten"
    assert pareto([choice.best]) == [choice.best]
    assert best_tried(make_problem(UNLIKE), [choice.best]) is choice.best


def test_an_equalised_plan_keeps_places_and_evens_parts() -> None:
    problem = make_problem(Situation((1.0, 3.0, 1.0, 3.0), (None,) * 4, 64, 32, 8))
    for scored in search(problem)[:10]:
        equal = equalised(scored.plan, TINY)
        validate(equal, TINY, problem.cluster)
        assert equal.devices() == scored.plan.devices()
        for replica in equal.replicas:
            layers = [size(st.layers) for st in replica.stages]
            assert max(layers) - min(layers) <= 1


def test_what_binds_is_said() -> None:
    roomy = replace(make_problem(UNLIKE), kv_bytes=Bytes(1 << 26))
    found = search(roomy)[0]
    lines = binding(roomy, found.plan, try_plan(roomy, found, roomy.items))
    assert lines and all("--max-num-seqs 8" in line for line in lines)
    tight = make_problem(Situation((1.0, 1.0), (1_700_000, 1_700_000), 64, 200, 64))
    found = search(tight)[0]
    lines = binding(tight, found.plan, try_plan(tight, found, tight.items))
    assert any("KV room for" in line for line in lines)


def test_one_device_more_never_brings_less() -> None:
    problem = make_problem(UNLIKE)
    now = search(problem)[0]
    gains = list(one_more(problem, now))
    assert [g.like for g in gains] == ["cpu:0", "cpu:1"]
    assert gains[0].ratio >= gains[1].ratio >= 1.0


def test_group_counts_are_the_brains() -> None:
    """The brain rotates as many micro-batches as the estimate says."""
    from evener.brain import Brain, BrainConfig

    problem = make_problem(Situation((1.0, 1.0, 5.0), (1_500_000,) * 3, 8, 8, 8))
    deep = [s for s in search(problem) if len(s.plan.replicas[0].stages) > 1]
    assert deep
    for scored in deep:
        brain = Brain(scored.plan, [50] * len(scored.plan.replicas), problem.costs(scored.plan), BrainConfig())
        for engine, capacity in zip(brain.replicas, scored.load.replicas, strict=True):
            assert len(engine.groups) == capacity.groups
    assert (group_count(1, 5, 5), group_count(4, 40, 10), group_count(4, 13, 10)) == (1, 4, 2)


# ---- verdicts -----------------------------------------------------------------------------------------------


def test_layouts_are_parsed_or_refused() -> None:
    assert parse_layout("tp=8, pp=4,dp=2") == (8, 4, 2) and parse_layout("dp=3") == (1, 1, 3)
    for wrong in ("tp=0", "tp=2,tp=2", "ep=2", "", "tp=x"):
        with pytest.raises(InvalidInput, match="write tp=8,pp=4,dp=2"):
            parse_layout(wrong)


def test_a_verdict_names_the_loss_and_its_share_is_in_the_ledger() -> None:
    problem = make_problem(Situation((1.0, 4.0), (None, None), 64, 32, 8))
    roofline = replace(problem, factory=None)
    best = choose_plan(roofline, baselines=False, requests=60).best
    found = assess(roofline, (2, 1, 1), list(roofline.items), best)
    assert found.verdict == "wasteful" and found.tried is not None
    line = next(text for text in found.findings if text.startswith("straggler: cpu:0"))
    share = found.tried.ledger["cpu:0"]["straggler"]
    assert share > 0.3 and f"{share:.0%} of its time" in line
    piped = assess(roofline, (1, 2, 1), list(roofline.items), best)
    assert any(text.startswith("bubble: cpu:0") for text in piped.findings)


def test_a_layout_that_cannot_serve_says_why() -> None:
    problem = make_problem(UNLIKE)
    assert assess(problem, (4, 1, 1), problem.items).verdict == "cannot serve"
    rushed = under(problem, 1e5)
    assert assess(rushed, (1, 1, 2), rushed.items).verdict == "unfit"
    assert assess(under(problem, 0.1), (1, 1, 2), under(problem, 0.1).items).verdict == "viable"


# ---- sizes, commands, the automatic choice ------------------------------------------------------------------


def test_the_size_is_the_least_that_carries_the_rate() -> None:
    problem = make_problem(UNLIKE)
    alone = score(problem, search(copies(problem, problem.cluster.devices[0], 1))[0].plan).load.requests_s
    sized = {s.like: s for s in size_for(under(problem, alone * 2.5))}
    assert sized["cpu:0"].count == 3 and (sized["cpu:1"].count or 0) > 3
    with pytest.raises(InvalidInput, match="needs traffic with a rate"):
        list(size_for(problem))


def test_links_as_stated_where_hosts_are_added() -> None:
    """Hosts that `--size` and one device more add are joined as those of the cluster are, not by an assumed network."""
    problem = make_problem(Situation((1.0,) * 2, (None,) * 2, 64, 32, 8))
    far = [
        structs.replace(d, name=f"h{k}/cuda:0", host=f"h{k}", kind="cuda")
        for k, d in enumerate(problem.cluster.devices)
    ]
    profiles = [
        structs.replace(p, name=d.name, hardware=d.name) for p, d in zip(problem.profile.devices, far, strict=True)
    ]
    fast = Link("h0", "h1", Seconds(3e-6), 50e9)
    problem = replace(
        problem, cluster=Cluster(tuple(far), (fast,)), profile=structs.replace(problem.profile, devices=tuple(profiles))
    )
    sized = copies(problem, far[0], 3)
    assert {(x.a, x.b, x.bandwidth) for x in sized.cluster.links} == {("*", "*", 50e9)}
    larger = with_more(problem, {"h0/cuda:0": 1})
    (new,) = larger.cluster.devices[2:]
    (link,) = Links(larger.cluster.links).between([new.name], ["h1/cuda:0"])
    assert link.bandwidth == 50e9


def test_commands_for_other_engines() -> None:
    problem = make_problem(Situation((1.0,) * 4, (None,) * 4, 64, 32, 8))
    refused = emit("vllm", problem, tried_of(problem, search(problem)[0].plan), "M")
    assert all(x.command is None and "CPU" in x.notes[0] for x in refused)
    devices = tuple(structs.replace(d, kind="cuda", index=k) for k, d in enumerate(problem.cluster.devices))
    gpus = replace(problem, cluster=structs.replace(problem.cluster, devices=devices))
    from evener.plan.default import equal_plan

    plan = equal_plan(TINY, devices, 2, 2, 1)
    stages = plan.replicas[0].stages
    moved = (structs.replace(stages[0], layers=(0, 2)), structs.replace(stages[1], layers=(2, 6)))
    unequal = structs.replace(plan, replicas=(structs.replace(plan.replicas[0], stages=moved),))
    (vllm,) = emit("vllm", gpus, tried_of(problem, unequal), "M")
    assert vllm.command is not None
    for part in ("CUDA_VISIBLE_DEVICES=0,1,2,3", "VLLM_PP_LAYER_PARTITION=2,4", "--tensor-parallel-size 2",
                 "--pipeline-parallel-size 2", "--dtype float32"):  # fmt: skip
        assert part in vllm.command
    (sglang,) = emit("sglang", gpus, tried_of(problem, unequal), "M")
    assert sglang.command is not None and "--tp-size 2" in sglang.command
    (three,) = emit("vllm", gpus, tried_of(problem, equal_plan(TINY, devices, 3, 1, 1)), "M")
    assert three.command is None and "8 query heads do not divide by 3" in three.notes
    equal = tried_of(problem, equal_plan(TINY, devices, 2, 2, 1))
    (even,) = emit("vllm", gpus, equal, "M")
    assert even.command is not None and "VLLM_PP_LAYER_PARTITION=3,3" in even.command, "where a remainder goes differs"
    for model, says in (
        (structs.replace(TINY, heads=12, kv_heads=3), "3 KV heads and 2 ranks do not divide"),
        (structs.replace(TINY, ffn=255), "255 FFN columns do not divide by 2"),
    ):
        (odd,) = emit("vllm", replace(gpus, model=model), equal, "M")
        assert odd.command is None and any(says in note for note in odd.notes)
    fp8 = replace(gpus, memory=structs.replace(gpus.memory, kv_dtype="fp8"))
    (small,) = emit("vllm", fp8, equal, "M")
    assert small.command is not None and "--kv-cache-dtype fp8" in small.command
    (other,) = emit("sglang", replace(gpus, memory=structs.replace(gpus.memory, kv_dtype="int8")), equal, "M")
    assert any("sglang keeps KV in fp32, not int8" in note for note in other.notes)


def tried_of(problem: Problem, plan: Plan):  # type: ignore[no-untyped-def]
    scored: Scored = score(problem, plan)
    return try_plan(problem, scored, problem.items)


def test_the_automatic_choice(tmp_path: Path) -> None:
    problem = make_problem(UNLIKE)
    mix = TrafficMix(64.0, 32.0)
    plan, why = choose_layout(
        TINY, problem.cluster, problem.profile, mix, problem.memory, problem.kv_bytes, 8, "equal-time"
    )
    assert plan.name in why
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml", TINY) == plan
    items = spread_items(mix, 1024)
    assert items == spread_items(mix, 1024) and max(i.input_tokens + i.output_tokens for i in items) <= 1024
    assert sum(i.input_tokens for i in items) / len(items) == pytest.approx(64, rel=0.1)
    with pytest.raises(InvalidPlan):
        small = Situation((1.0, 1.0), (300_000,) * 2, 64, 32, 8)
        tight = make_problem(small)
        choose_layout(TINY, tight.cluster, tight.profile, mix, tight.memory, None, 8, "equal-time")
