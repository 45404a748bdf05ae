"""How the cases of a comparison are spelt."""

from pathlib import Path
from typing import Any

import pytest

from evener.api import EngineOptions, make_options
from evener.cli.cases import read_cases
from evener.errors import InvalidInput

BASE = make_options(devices=("cpu:0", "cpu:1"), max_num_seqs=8)


def options(text: str) -> EngineOptions:
    [case] = read_cases([text], None, BASE)
    return case.options


def test_a_case_changes_only_what_it_says() -> None:
    got = options("a name, with: -tp 2 --policy fcfs")
    assert got == make_options(devices=BASE.devices, max_num_seqs=8, tensor_parallel_size=2, policy="fcfs")
    assert options("nothing:") == BASE


def test_devices_are_words_and_may_be_quoted() -> None:
    assert options("x: --devices 'cpu:0 cpu:1,slowdown=2'").devices == ("cpu:0", "cpu:1,slowdown=2")


def test_a_value_that_is_the_default_is_said_too() -> None:
    assert options("x: --max-num-seqs 64").max_num_seqs == 64


def test_a_file_and_flags_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text(
        "flags: -tp 2 --split equal --devices 'cpu:0 cpu:0#1'\n"
        "mapping: {tp: 2, split: equal, devices: cpu:0 cpu:0#1}\n"
        "empty:\n"
    )
    flags, mapping, empty, last = read_cases(["last: -dp 2"], file, BASE)
    assert flags.options == mapping.options != BASE and empty.options == BASE
    assert last.name == "last" and last.options.data_parallel_size == 2


@pytest.mark.parametrize(
    ("texts", "yaml", "says"),
    [
        (["no colon"], None, "write 'NAME: FLAGS'"),
        ([": -tp 2"], None, "write 'NAME: FLAGS'"),
        (["a: -tp 2", "a: -pp 2"], None, "two cases are called 'a'"),
        (["a: --nix 3"], None, "case 'a': No such option: --nix"),
        (["a: -tp two"], None, "case 'a': Invalid value"),
        (["a: --devices 'cpu:0"], None, "balance the quotes"),
        ([], "- a\n- b", "no mapping"),
        ([], "a: [1, 2]", "write flags as a text or a mapping"),
        ([], "a: {", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(texts: list[str], yaml: str | None, says: str, tmp_path: Path) -> None:
    file = None
    if yaml is not None:
        file = tmp_path / "cases.yaml"
        file.write_text(yaml)
    with pytest.raises(InvalidInput, match=says):
        read_cases(texts, file, BASE)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.yaml"):
        read_cases([], tmp_path / "nowhere.yaml", BASE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"devices": 5}, "option devices: expected `array`, got `int`"),
        ({"max_num_seqs": "a"}, "option max_num_seqs: expected `int`, got `str`"),
        ({"links": ("x",)}, r"option links\[0\]: expected `object`, got `str`"),
        ({"wings": 2}, "option 'wings' is unknown"),
    ],
)
def test_options_of_another_type_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        make_options(**options)
