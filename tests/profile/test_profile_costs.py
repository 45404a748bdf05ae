"""One way to ask for the cost model of devices that need not be here."""

from importlib.util import find_spec

import pytest

from evener.cost.base import BatchShape
from evener.cost.tables import MissingTerms
from evener.errors import InvalidInput
from evener.plan.default import equal_plan
from evener.profile.costs import costs_of
from evener.spec.cluster_text import cluster_from_mapping
from evener.spec.model import ModelSpec

LLAMA_8B = ModelSpec("llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072)
STEP = BatchShape(decode_rows=16, decode_context=16_000, sampled_rows=16)


def far(profile: str, count: int = 2) -> tuple:  # type: ignore[type-arg]
    raw = {"hosts": [{"name": "far", "devices": [{"device": "cuda:0", "profile": profile, "count": count}]}]}
    cluster = cluster_from_mapping(raw)
    return LLAMA_8B, equal_plan(LLAMA_8B, list(cluster.devices), count, 1, 1), cluster


@pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="the extra `tables` is missing")
def test_peaks_and_tables_agree_on_a_decode_step_within_a_third() -> None:
    for gpu in ("h100_sxm", "a100_sxm_80gb"):
        peaks, tables = (costs_of(*far(gpu), how).stage_ns(0, 0, STEP) for how in ("peaks", "tables"))
        assert tables == pytest.approx(peaks, rel=0.33)


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(InvalidInput, match="cost model 'guess'"):
        costs_of(*far("h100_sxm"), "guess")
    with pytest.raises(InvalidInput, match="no measured operators for l4"):
        costs_of(*far("l4"), "tables")
    with pytest.raises(InvalidInput, match="terms are for how='tables'"):
        costs_of(*far("l4"), "peaks", terms=MissingTerms())
