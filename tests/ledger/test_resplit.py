"""What the verdict advises on ranks that are late can be served as it is said."""

import re
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from evener.ledger.rules_peers import _resplit
from evener.spec.model import QUANT_GROUP, ffn_group


@given(
    ffn=st.sampled_from([192, 1536, 4864, 8960, 14_336]),
    compute=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=4),
)
def test_advised_columns_are_a_legal_cut_in_every_dtype(ffn: int, compute: list[float]) -> None:
    ranks = [SimpleNamespace(heads=9, ffn=ffn // len(compute), compute_s=s) for s in compute]
    whole = sum(r.ffn for r in ranks)
    said = re.search(r"(\d+) of (\d+) FFN columns", _resplit(cast(Any, ranks), "cpu:0", 0))
    if said:
        columns = int(said[1])
        unit = ffn_group(whole) if whole % QUANT_GROUP == 0 else 1
        assert int(said[2]) == whole and (columns % unit == 0 or columns == whole)
