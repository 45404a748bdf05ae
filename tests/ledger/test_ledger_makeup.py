"""How compute time is divided by what a batch consists of."""

import pytest
from tests.ledger.accounts import Teller, plan_of
from tests.ledger.histories import Costs

from evener.cost.base import BatchShape
from evener.ledger.causes import Cause
from evener.ledger.makeup import pure_cause, weights
from evener.ledger.spans import MakeUp


def shares(made_of: MakeUp, late: int = 0, repeat: int = 1) -> dict[Cause, float]:
    causes, parts = weights(Costs(), 0, 0, made_of, late, repeat)
    return {Cause(c): p / sum(parts) for c, p in zip(causes, parts, strict=True)}


def test_a_batch_of_one_kind_has_one_cause() -> None:
    assert pure_cause(MakeUp(BatchShape(prefill_tokens=9)), 0) is Cause.PREFILL
    assert pure_cause(MakeUp(BatchShape(decode_rows=3)), 0) is Cause.DECODE
    assert pure_cause(MakeUp(BatchShape(decode_rows=3)), 1) is None
    assert pure_cause(MakeUp(BatchShape(prefill_tokens=9), 2), 0) is None
    assert pure_cause(MakeUp(BatchShape(decode_rows=3, pad_tokens=1)), 0) is None
    assert pure_cause(MakeUp(BatchShape(prefill_tokens=9, decode_rows=3)), 0) is None


def test_prompt_and_rows_share_as_the_cost_model_says() -> None:
    # Alone: 10 + 2 * 20 = 50 for the prompt, 10 + 15 = 25 for the rows.
    parts = shares(MakeUp(BatchShape(prefill_tokens=20, decode_rows=15)))
    assert parts == {Cause.PREFILL: pytest.approx(2 / 3), Cause.DECODE: pytest.approx(1 / 3)}


def test_rows_of_one_kind_cost_the_same() -> None:
    assert shares(MakeUp(BatchShape(decode_rows=8)), late=2) == {
        Cause.DECODE: pytest.approx(0.75),
        Cause.SPECULATION: pytest.approx(0.25),
    }
    assert shares(MakeUp(BatchShape(prefill_tokens=40), recompute_tokens=30)) == {
        Cause.PREFILL: pytest.approx(0.25),
        Cause.RECOMPUTE: pytest.approx(0.75),
    }
    assert shares(MakeUp(BatchShape(decode_rows=1, pad_tokens=3))) == {
        Cause.DECODE: pytest.approx(0.25),
        Cause.PADDING: pytest.approx(0.75),
    }


def test_everything_at_once() -> None:
    made_of = MakeUp(BatchShape(prefill_tokens=20, decode_rows=15, pad_tokens=15), recompute_tokens=5)
    parts = shares(made_of, late=3)
    real = 0.7
    assert parts[Cause.PADDING] == pytest.approx(0.3)
    assert parts[Cause.PREFILL] == pytest.approx(real * 2 / 3 * 0.75, rel=1e-5)
    assert parts[Cause.RECOMPUTE] == pytest.approx(real * 2 / 3 * 0.25, rel=1e-5)
    assert parts[Cause.DECODE] == pytest.approx(real / 3 * 0.8, rel=1e-5)
    assert parts[Cause.SPECULATION] == pytest.approx(real / 3 * 0.2, rel=1e-5)


def test_late_rows_of_repeated_steps() -> None:
    assert shares(MakeUp(BatchShape(decode_rows=2)), late=1, repeat=10)[Cause.SPECULATION] == pytest.approx(1 / 20)


def test_only_padding_is_padding() -> None:
    assert shares(MakeUp(BatchShape(pad_tokens=4))) == {Cause.PADDING: 1.0}


def test_the_ledger_divides_to_the_nanosecond() -> None:
    teller = Teller(plan_of((4, 1)))
    teller.state(0)
    made_of = MakeUp(BatchShape(prefill_tokens=20, decode_rows=15, sampled_rows=16))
    teller.batch(0, {(0, 0): (0, 1, {"compute": 0.1})}, made_of=made_of)
    causes = teller.ledger.account().devices["d0.0.0"].causes_ns
    assert (causes[Cause.PREFILL], causes[Cause.DECODE]) == (66_667, 33_333)
    assert causes[Cause.UNATTRIBUTED] == 900_000
