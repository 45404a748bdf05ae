"""Ledgers as a picture."""

import itertools
import sys
from pathlib import Path

import pytest
from tests.laws.traffic import SimpleCosts

from evener.cli.paths import check_picture
from evener.cost.base import BatchShape
from evener.errors import InvalidInput
from evener.ledger.account import Account
from evener.ledger.causes import USEFUL, Cause
from evener.ledger.colours import COLOURS
from evener.ledger.ledger import Ledger
from evener.ledger.spans import MakeUp, Span
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import NS_PER_S, Nanoseconds
from evener.workload.bars import MOST_BARS, plot_ledgers


def account(devices: int) -> Account:
    """One device loads for a second, decodes for one, and has nothing to do for two."""
    names = [f"cpu:0#{k}" for k in range(devices)]
    plan = Plan(tuple(Replica((Stage((0, 1), (Shard(n, (0, 1), (0, 1)),)),)) for n in names))
    ledger = Ledger(plan, SimpleCosts(1), start=Nanoseconds(0))
    at = [Nanoseconds(k * NS_PER_S) for k in range(5)]
    for r in range(devices):
        ledger.up(r, at[1])
    ledger.issued(0, 0, at[1], MakeUp(BatchShape(decode_rows=1, decode_context=9, sampled_rows=1)))
    second = Nanoseconds(NS_PER_S)
    none = Nanoseconds(0)
    ledger.span(Span(0, 0, 0, 0, 0, at[1], at[2], second, second, none, none, none, none))
    ledger.done(0, 0, at[2], 0)
    ledger.settle(at[4])
    return ledger.account()


def test_every_cause_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(Cause)
    rgb = {c: [int(x[k : k + 2], 16) for k in (1, 3, 5)] for c, x in COLOURS.items()}
    for a, b in itertools.combinations(Cause, 2):
        assert sum(abs(x - y) for x, y in zip(rgb[a], rgb[b], strict=True)) > 60, f"{a.label} looks like {b.label}"
    # Calm: blue rules in what is useful, and in no loss that computes or waits.
    assert all(rgb[c][2] == max(rgb[c]) for c in USEFUL)


def test_a_picture_is_drawn_with_a_bar_per_device(tmp_path: Path) -> None:
    path = tmp_path / "ledgers.svg"
    plot_ledgers([("mine", account(2)), ("theirs", account(1))], path, "A title", "a note")
    drawn = path.read_text()
    for colour in (COLOURS[Cause.DECODE], COLOURS[Cause.NO_DEMAND], COLOURS[Cause.DOWN]):
        assert colour in drawn
    assert COLOURS[Cause.STRAGGLER] not in drawn, "a cause without time has no colour in the picture"
    png = tmp_path / "ledgers.png"
    plot_ledgers([("mine", account(2))], png, "A title")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.png, \.svg, \.pdf"):
        plot_ledgers([("a", account(1))], tmp_path / "a.gif", "title")
    with pytest.raises(InvalidInput, match=f"limit is {MOST_BARS}"):
        plot_ledgers([("a", account(MOST_BARS + 1))], tmp_path / "a.png", "title")
    with pytest.raises(InvalidInput, match="cannot be written"):
        plot_ledgers([("a", account(1))], tmp_path / "nowhere" / "a.png", "title")


def test_what_cannot_be_drawn_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_picture(None, "--plot")
    with pytest.raises(InvalidInput, match="no directory"):
        check_picture(tmp_path / "nowhere" / "a.png", "--plot")
    with pytest.raises(InvalidInput, match=r"--plot .*\.png, \.svg, \.pdf"):
        check_picture(tmp_path / "a.gif", "--plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidInput, match="needs matplotlib"):
        check_picture(tmp_path / "a.png", "--plot")
