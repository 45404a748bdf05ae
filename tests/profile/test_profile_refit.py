"""Fits find the machine behind the spans: one cost model plays the machine, another is fitted to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.cost.base import BatchShape, stepwise_run
from evener.cost.fitted import KNOTS, Corrections, Factors, corrected, features
from evener.cost.rates import Collective, DeviceProfile, GemmRates, Profile, Rates, any_kv
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidInput
from evener.ledger.spans import MakeUp, Op, Span, Traffic
from evener.profile.refit import LEAST, Refit, describe
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds

MODEL = ModelSpec("llama", 8192, 512, 8, 8, 4, 64, 1536, 4096, tied=True)
GUESS = Rates((GemmRates("fp32", ((1, 4e9), (16, 20e9), (256, 20e9))),), 10e9, any_kv(10e9, 10e9), 2000.0)
TRUE = Rates((GemmRates("fp32", ((1, 3e9), (16, 31e9), (256, 44e9))),), 9e9, any_kv(4e9, 25e9), 6000.0)


def profile(rates: Rates, reduce_ns: float = 20_000.0) -> Profile:
    devices = tuple(DeviceProfile(f"cpu:{k}", "cpu", rates, rates) for k in range(2))
    line = Collective("test", 2, ((1024, reduce_ns), (1 << 20, 10 * reduce_ns)))
    return Profile(devices, (line,), "measured", host_ns=0)


def pair() -> Plan:
    left = Shard("cpu:0", (0, 4), (0, 1024), (0, 4096), (0, 4096))
    right = Shard("cpu:1", (4, 8), (1024, 1536), (4096, 8192), (4096, 8192))
    return Plan((Replica((Stage((0, 8), (left, right)),)),))


BASE = RooflineCostModel(MODEL, pair(), profile(GUESS))
MACHINE = RooflineCostModel(MODEL, pair(), profile(TRUE, 70_000.0))


def shapes(count: int, seed: int = 0) -> list[BatchShape]:
    """Decode steps, chunks and both, as a server sees them."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        rows, chunk = int(rng.integers(0, 64)), int(rng.integers(0, 400)) if rng.random() < 0.4 else 0
        start = int(rng.integers(0, 500))
        rows = rows if chunk else max(1, rows)
        pairs = chunk * start + chunk * (chunk + 1) // 2
        out.append(BatchShape(chunk, pairs, rows, rows * int(rng.integers(10, 800)), rows + (chunk > 0), 0, chunk > 0))
    return out


def fed(count: int, noise: float = 0.0, slow: float = 0.0) -> Refit:
    """What the machine's shards do for these batches; a share `slow` of them takes 1.8 times as long."""
    refit, rng = Refit(BASE), np.random.default_rng(1)
    for number, shape in enumerate(shapes(count)):
        refit.issued(0, number, MakeUp(shape))
        for rank, time in enumerate(MACHINE.shards_ns(0, 0, shape)):
            speed = 1.8 if rng.random() < slow else 1.0
            took = max(1, round(time.compute * speed * (1 + noise * rng.standard_normal())))
            nbytes = shape.tokens * 512 * 4 * 17
            moved = Traffic(int(Op.ALL_REDUCE), 17, nbytes, Nanoseconds(0), Nanoseconds(17 * 70_000 + nbytes // 10))
            refit.span(Span(0, 0, rank, 0, number, Nanoseconds(0), Nanoseconds(took), Nanoseconds(took),
                            Nanoseconds(took), Nanoseconds(0), Nanoseconds(0), Nanoseconds(0), Nanoseconds(0),
                            traffic=(moved,)))  # fmt: skip
    return refit


def test_a_fit_finds_the_machine_and_tells_its_error() -> None:
    fit = fed(400).corrections()
    assert fit.base_error > 0.1 and fit.error < 0.03
    better = corrected(BASE, fit, 1)
    assert better.error() == fit.error and better.version == 1 and BASE.error() is None
    for shape in shapes(100, seed=7):
        for ours, theirs in zip(better.shards_ns(0, 0, shape), MACHINE.shards_ns(0, 0, shape), strict=True):
            assert ours.compute + ours.straggler == pytest.approx(theirs.compute + theirs.straggler, rel=0.12)


def test_noise_is_averaged_and_is_the_error_that_is_told() -> None:
    fit = fed(1500, noise=0.1).corrections()
    assert 0.04 < fit.error < 0.1
    better = corrected(BASE, fit, 1)
    off = [better.stage_ns(0, 0, s) / MACHINE.stage_ns(0, 0, s) - 1 for s in shapes(100, seed=7)]
    assert abs(float(np.median(off))) < 0.05


@pytest.mark.parametrize("slow", [0.03, 0.3])
def test_a_fit_keeps_the_total_where_a_device_has_two_speeds(slow: float) -> None:
    """Be the slow batches few and left out as outliers, or many: throughput is made of totals."""
    refit = fed(800, noise=0.05, slow=slow)
    better = refit.fit(1)
    for (r, s, k), seen in refit._seen.items():
        own = better.own_times(r, s, k)
        said = sum(sum(features(own, o.shape, o.repeat)) for o in seen)
        assert said == pytest.approx(sum(o.compute_ns for o in seen), rel=0.02)


def test_collectives_and_host_time_become_lines() -> None:
    refit = fed(100)
    for k in range(200):
        refit.host(100_000 + 2_000 * (k % 10), k % 10)
    fit = refit.corrections()
    (line,) = fit.collectives
    assert line.ranks == 2 and dict(line.points)[1 << 20] == pytest.approx(70_000 + (1 << 20) / 10, rel=0.05)
    assert fit.host_ns == pytest.approx(100_000 + 2_000 * 4.5, rel=0.1)
    assert len(describe(fit)) == 3


def test_ranks_that_are_late_in_turns_are_waited_for() -> None:
    """By as much as even the rank that waits the least waits; and each still computes what it computes."""
    refit, zero = Refit(BASE), Nanoseconds(0)
    for number, shape in enumerate(shapes(LEAST)):
        refit.issued(0, number, MakeUp(shape))
        times = BASE.shards_ns(0, 0, shape)
        slowest = max(t.compute for t in times)
        for rank, time in enumerate(times):
            waited = Nanoseconds(time.straggler + round(0.05 * slowest))
            ended = Nanoseconds(time.compute + waited)
            refit.span(Span(0, 0, rank, 0, number, zero, ended, time.compute, time.compute, zero, waited, zero, zero))
    fit = refit.corrections()
    assert fit.uneven == pytest.approx(0.05, abs=1e-3)
    better = corrected(BASE, Corrections({}, uneven=fit.uneven), 1)
    for shape in shapes(50, seed=7):
        ours, before = better.shards_ns(0, 0, shape), BASE.shards_ns(0, 0, shape)
        slowest = max(t.compute for t in before)
        for a, b in zip(ours, before, strict=True):
            assert a.compute == pytest.approx(b.compute, abs=2)
            assert a.straggler - b.straggler == pytest.approx(0.05 * slowest, rel=0.05, abs=100)


def test_what_one_run_left_open_is_no_part_of_the_next() -> None:
    """Batches of two recordings have the same numbers; a rank of one does not wait for a rank of the other."""
    refit, zero, shape = Refit(BASE), Nanoseconds(0), BatchShape(decode_rows=8, decode_context=800, sampled_rows=8)

    def told(number: int, rank: int, waited: int) -> None:
        took, late = Nanoseconds(1000), Nanoseconds(waited)
        refit.span(Span(0, 0, rank, 0, number, zero, took, took, took, zero, late, zero, zero))

    refit.issued(0, 0, MakeUp(shape))
    told(0, 0, 900)  # the recording ends here
    for number in range(LEAST):
        refit.issued(0, number, MakeUp(shape))
        told(number, 1, 900)
        told(number, 0, 100)
    assert refit.corrections().uneven == pytest.approx(0.1)


@given(rows=st.integers(1, 80), context=st.integers(1, 20_000), uneven=st.sampled_from([0.0, 0.03]))
def test_steps_of_ranks_that_are_late_in_turns_are_worked_out_alike(rows: int, context: int, uneven: float) -> None:
    """Law 9: one by one or all at once."""
    model = corrected(BASE, Corrections({}, uneven=uneven), 1)
    at_once = model.decode_run(0, 0, rows, context, 20)
    one_by_one = stepwise_run(model, 0, 0, rows, context, 20)
    assert at_once.host == one_by_one.host
    assert (at_once.busy == one_by_one.busy).all() and (at_once.shards == one_by_one.shards).all()


def test_what_the_spans_never_did_stays_near_what_they_did() -> None:
    refit = Refit(BASE)
    for number in range(LEAST):
        shape = BatchShape(decode_rows=8, decode_context=8 * 100, sampled_rows=8)
        refit.issued(0, number, MakeUp(shape))
        for rank in range(2):
            took = Nanoseconds(round(3 * sum(features(BASE.own_times(0, 0, rank), shape))))
            zero = Nanoseconds(0)
            refit.span(Span(0, 0, rank, 0, number, zero, took, took, took, zero, zero, zero, zero))
    better = refit.fit(1)
    prompt = BatchShape(prefill_tokens=200, prefill_pairs=200 * 201 // 2, chunks=1)
    ours, before = (m.shards_ns(0, 0, prompt)[0] for m in (better, BASE))
    assert ours.compute == pytest.approx(3 * before.compute, rel=0.1)


def test_too_few_spans_are_an_error_that_names_the_device() -> None:
    with pytest.raises(InvalidInput, match=rf"needs {LEAST} spans of cpu:0 .*there are 10"):
        fed(10).fit(1)
    assert not Refit(BASE, every=0).due


def test_a_fit_is_due_after_so_many_batches() -> None:
    refit = fed(LEAST)
    refit._every = LEAST
    assert refit.due
    refit.fit(1)
    assert not refit.due


def test_spans_of_unknown_batches_say_nothing() -> None:
    refit, zero = Refit(BASE), Nanoseconds(0)
    refit.span(Span(0, 0, 0, 0, 99, zero, zero, Nanoseconds(5), Nanoseconds(5), zero, zero, zero, zero))
    with pytest.raises(InvalidInput, match="there are 0"):
        refit.fit(1)


@settings(max_examples=40)
@given(
    factors=st.lists(st.floats(0.0, 20.0), min_size=len(KNOTS), max_size=len(KNOTS)),
    rest=st.tuples(*[st.floats(0.0, 20.0)] * 4),
    base=st.tuples(*[st.integers(0, 3000)] * 4),
    more=st.tuples(*[st.integers(0, 500)] * 4),
    uneven=st.sampled_from([None, 0.0, 0.07]),
)
def test_whatever_a_fit_finds_more_work_never_takes_less(
    factors: list[float], rest: tuple[float, ...], base: tuple[int, ...], more: tuple[int, ...], uneven: float | None
) -> None:
    fits = {"cpu:0": Factors(tuple(factors), *rest), "cpu:1": Factors()}
    model = corrected(BASE, Corrections(fits, host_ns=5, uneven=uneven, error=0.1), 1)

    def shape(v: tuple[int, ...]) -> BatchShape:
        return BatchShape(v[0], v[1], v[2], v[3], v[2], 0, 0)

    total = tuple(a + b for a, b in zip(base, more, strict=True))
    assert model.stage_ns(0, 0, shape(base)) <= model.stage_ns(0, 0, shape(total))
    assert model.stage_ns(0, 0, BatchShape()) == 0


@given(rows=st.integers(1, 6000), repeat=st.integers(1, 50))
def test_features_sum_to_what_the_base_model_says(rows: int, repeat: int) -> None:
    shape = BatchShape(decode_rows=rows, decode_context=rows * 100, sampled_rows=rows)
    own = BASE.own_times(0, 0, 0)
    steps = [BatchShape(decode_rows=rows, decode_context=rows * (100 + k), sampled_rows=rows) for k in range(repeat)]
    assert sum(features(own, shape, repeat)) == pytest.approx(sum(sum(features(own, s)) for s in steps), rel=1e-6)
