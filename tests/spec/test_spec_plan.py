"""Plans: splits are laws, refusals say the place, the reason and the remedy."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from evener.errors import InvalidPlan
from evener.spec.cluster import Cluster, parse_device
from evener.spec.model import ModelSpec
from evener.spec.plan import (
    Plan,
    Replica,
    Shard,
    Stage,
    from_mapping,
    head_unit,
    size,
    split_by_weight,
    split_even,
    validate,
)

SMOL = ModelSpec("llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, tied=True)
CLUSTER = Cluster(tuple(parse_device(f"cpu:{k}") for k in range(4)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 500), st.lists(st.floats(0, 10), min_size=1, max_size=8), st.sampled_from([1, 4, 16]))
def test_split_covers_in_order_on_multiples(total: int, weights: list[float], multiple: int) -> None:
    if sum(weights) == 0:
        with pytest.raises(InvalidPlan, match="one of them positive"):
            split_by_weight(total, weights, multiple)
        return
    parts = split_by_weight(total, weights, multiple)
    assert len(parts) == len(weights)
    assert parts[0][0] == 0 and parts[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert all(cut % multiple == 0 or cut == total for part in parts for cut in part)
    units = [-(-size(p) // multiple) for p in parts]
    for i, wi in enumerate(weights):
        assert abs(units[i] - sum(units) * wi / sum(weights)) <= 1 + 1e-6, "never off by more than one unit"
        assert all(units[i] <= units[j] for j, wj in enumerate(weights) if wi < wj * (1 - 1e-6))


def test_known_splits() -> None:
    assert split_even(9, 2) == ((0, 5), (5, 9))
    assert [size(x) for x in split_even(9, 4)] == [3, 2, 2, 2]
    assert split_by_weight(9, [3, 0, 1]) == ((0, 7), (7, 7), (7, 9))
    assert split_by_weight(100, [1, 1], 48) == ((0, 96), (96, 100)), "three units of 48, the last one short"


def test_kv_heads_follow_from_query_heads() -> None:
    heads = [(0, 5), (5, 9), (3, 6), (9, 9)]
    assert [Shard("d", h, (0, 0)).kv_heads(SMOL) for h in heads] == [(0, 2), (1, 3), (1, 2), (0, 0)]


def test_head_cuts_are_whole_groups() -> None:
    assert [head_unit(structs.replace(SMOL, quant_group=g)) for g in (1, 32, 64, 128, 96)] == [1, 1, 1, 2, 3]


def shard(device: str, **parts: tuple[int, int]) -> Shard:
    return Shard(
        device, **{"heads": (0, 9), "ffn": (0, 1536), "embed_rows": (0, 49152), "head_rows": (0, 49152), **parts}
    )


def two(first: dict[str, Any], second: dict[str, Any]) -> Plan:
    left = {"heads": (0, 5), "ffn": (0, 768), "embed_rows": (0, 24576), "head_rows": (0, 24576)}
    right = {"heads": (5, 9), "ffn": (768, 1536), "embed_rows": (24576, 49152), "head_rows": (24576, 49152)}
    names = [first.pop("device", "cpu:0"), second.pop("device", "cpu:1")]
    shards = (shard(names[0], **{**left, **first}), shard(names[1], **{**right, **second}))
    return Plan((Replica((Stage((0, 30), shards),)),))


def staged(*layers: tuple[int, int]) -> Plan:
    last = len(layers) - 1
    stages = [
        Stage(x, (shard(f"cpu:{s}", embed_rows=(0, 49152 * (s == 0)), head_rows=(0, 49152 * (s == last))),))
        for s, x in enumerate(layers)
    ]
    return Plan((Replica(tuple(stages)),))


REFUSED = {
    "hole in heads": (two({}, {"heads": (6, 9)}), r"query heads \[5, 6\) belong to nobody.*touch"),
    "heads twice": (two({}, {"heads": (4, 9)}), r"query heads \[4, 5\) are held twice"),
    "too few heads": (two({}, {"heads": (5, 8)}), r"query heads \[8, 9\) belong to nobody; extend"),
    "too many heads": (two({}, {"heads": (5, 10)}), r"\[5, 10\) are not inside \[0, 9\); the model has 9"),
    "backwards": (two({"heads": (5, 0)}, {}), r"query heads \[5, 0\) run backwards; write \[0, 5\]"),
    "negative": (two({"ffn": (-1, 768)}, {}), r"FFN columns \[-1, 768\) are not inside"),
    "empty outside": (two({}, {"ffn": (2000, 2000)}), r"FFN columns \[2000, 2000\) are not inside"),
    "hole in ffn": (two({"ffn": (0, 700)}, {}), r"FFN columns \[700, 768\) belong to nobody"),
    "hole in embedding": (two({"embed_rows": (0, 5)}, {}), r"embedding rows \[5, 24576\)"),
    "hole in head": (two({"head_rows": (0, 5)}, {}), r"head rows \[5, 24576\)"),
    "unknown device": (two({}, {"device": "cpu:9"}), r"'cpu:9' is unknown \(devices: cpu:0.*--devices"),
    "device twice": (two({}, {"device": "cpu:0"}), r"cpu:0 already works in replica 0, stage 0.*cpu:0#1"),
    "hole in layers": (staged((0, 10), (11, 30)), r"replica 0: layers \[10, 11\) belong to nobody"),
    "layers twice": (staged((0, 10), (9, 30)), r"layers \[9, 10\) are held twice"),
    "stage without layers": (staged((0, 30), (30, 30)), r"stage 1 has no layer; drop the stage"),
    "no shared role": (
        structs.replace(staged((0, 30)), replicas=(structs.replace(staged((0, 30)).replicas[0], role="decode"),)),
        "replica 0 has role decode.*use both",
    ),
    "no replica": (Plan(()), "no replica; give at least one"),
    "no stage": (Plan((Replica(()),)), "replica 0 has no stage"),
    "no shard": (Plan((Replica((Stage((0, 30), ()),)),)), "stage 0 has no shard; name at least one device"),
    "head on the first of two": (
        Plan((Replica((Stage((0, 9), (shard("cpu:0"),)), Stage((9, 30), (shard("cpu:1"),)))),)),
        "head rows belong to the last stage only",
    ),
    "embedding on the last of two": (
        Plan((Replica((Stage((0, 9), (shard("cpu:0", head_rows=(0, 0)),)), Stage((9, 30), (shard("cpu:1"),)))),)),
        "embedding rows belong to the first stage only",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_place_reason_and_remedy(name: str) -> None:
    plan, message = REFUSED[name]
    with pytest.raises(InvalidPlan, match=message):
        validate(plan, SMOL, CLUSTER)


def test_accepted() -> None:
    validate(two({}, {}), SMOL, CLUSTER)
    validate(two({"heads": (0, 9)}, {"heads": (9, 9)}), SMOL, CLUSTER)
    validate(staged((0, 1), (1, 29), (29, 30)), SMOL, CLUSTER)


def test_cuts_fall_on_the_quantisation_group() -> None:
    grouped = structs.replace(SMOL, quant_group=128)
    with pytest.raises(InvalidPlan, match=r"query head cut 5 is not a multiple of 2 .*share a scale.*move it to 4"):
        validate(two({}, {}), grouped, CLUSTER)
    with pytest.raises(InvalidPlan, match=r"FFN cut 700 is not a multiple of 128 .*move it to 640"):
        plan = two({"heads": (0, 4), "ffn": (0, 700)}, {"heads": (4, 9), "ffn": (700, 1536)})
        validate(plan, grouped, CLUSTER)
    validate(two({"heads": (0, 4)}, {"heads": (4, 9)}), grouped, CLUSTER)


def test_mapping_fills_in_even_splits() -> None:
    plan = from_mapping({"replicas": [{"stages": [{"shards": ["cpu:0", "cpu:1"]}]}]}, SMOL)
    validate(plan, SMOL, CLUSTER)
    (stage,) = plan.replicas[0].stages
    assert stage.layers == (0, 30)
    assert [sh.heads for sh in stage.shards] == [(0, 5), (5, 9)]
    assert [sh.head_rows for sh in stage.shards] == [(0, 24576), (24576, 49152)]


def test_mapping_even_splits_keep_to_the_quantisation_group() -> None:
    grouped = structs.replace(SMOL, quant_group=128)
    plan = from_mapping({"replicas": [{"stages": [{"shards": ["cpu:0", "cpu:1"]}]}]}, grouped)
    validate(plan, grouped, CLUSTER)


MALFORMED = {
    "not a mapping": ([], "list `replicas`"),
    "no replicas": ({"stages": []}, "list `replicas`"),
    "replica is a string": ({"replicas": ["cpu:0"]}, "replica 0 is a mapping with a list `stages`"),
    "no shards": ({"replicas": [{"stages": [{"layers": [0, 30]}]}]}, "stage 0 is a mapping with a list `shards`"),
    "shard is a number": ({"replicas": [{"stages": [{"shards": [3]}]}]}, "a shard is a device name or a mapping"),
    "no layers": ({"replicas": [{"stages": [{"shards": ["a"]}, {"shards": ["b"]}]}]}, r"write `layers: \[a, b\]`"),
    "heads for one": (
        {"replicas": [{"stages": [{"shards": [{"device": "a", "heads": [0, 9]}, "b"]}]}]},
        "heads is given for 1 of 2 shards; give it for all or for none",
    ),
    "three ends": ({"replicas": [{"stages": [{"layers": [0, 1, 2], "shards": ["a"]}]}]}, "does not parse"),
    "fraction": ({"replicas": [{"stages": [{"layers": [0, 30.5], "shards": ["a"]}]}]}, "does not parse"),
    "misspelt key": ({"replicas": [{"stages": [{"shards": ["a"], "layer": [0, 30]}]}]}, "unknown field `layer`"),
    "unknown role": ({"replicas": [{"role": "draft", "stages": [{"shards": ["a"]}]}]}, "does not parse.*draft"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_mapping_is_refused(name: str) -> None:
    raw, message = MALFORMED[name]
    with pytest.raises(InvalidPlan) as caught:
        from_mapping(raw, SMOL)
    assert re.search(message, caught.value.message)
