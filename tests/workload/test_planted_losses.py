"""Every planted loss is named by the verdict, and its wording carries the quantity that the benchmark applies."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_remedies_are_found_and_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the simulator, where nothing else disturbs; a neighbour on the core can only be planted live."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planted_losses

    chosen = [c for c in planted_losses.cases() if c.setting.hog < 0]
    assert len(chosen) == 5
    for planted in chosen:
        result = planted_losses.measure(planted, 1, tmp_path, live=False)
        assert result["named"], result["verdict"]
        assert "no remedy" not in result["remedy"], result["verdict"]
        assert result["gain"] > 1.02, result
        if planted.name.startswith("slowed rank"):
            assert planted_losses.straggler_check(result)["to_compute"] == pytest.approx(1, abs=1e-6)
