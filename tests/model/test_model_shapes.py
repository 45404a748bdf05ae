"""Shapes from configurations alone: the parameter counts that the models are known for."""

import json
from pathlib import Path
from typing import Any

import pytest

from evener.errors import UnsupportedModel
from evener.model.shapes import model_shape, shape_of
from evener.spec.model import ModelSpec

LLAMA2_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880}
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
FALCON = {
    "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
    "vocab_size": 65024, "multi_query": True,
}  # fmt: skip


def params(spec: ModelSpec) -> float:
    ends = spec.head_params() * (1 if spec.tied else 2)
    return spec.layers * spec.layer_params() + ends


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA2_70B, 68.98), (BLOOM, 176.2), (MISTRAL, 7.24), (GPT2, 0.124), (FALCON, 6.92)],
    ids=["llama2-70b", "bloom-176b", "mistral-7b", "gpt2", "falcon-7b"],
)
def test_parameters_are_those_the_model_is_known_for(config: dict[str, Any], billions: float) -> None:
    assert params(shape_of(config, "config.json")) / 1e9 == pytest.approx(billions, rel=0.01)


def test_key_value_heads_and_positions() -> None:
    assert shape_of(LLAMA2_70B, "x").kv_heads == 8
    falcon = shape_of(FALCON, "x")
    assert (falcon.kv_heads, falcon.head_dim, falcon.max_position) == (1, 64, 2048)
    assert shape_of(GPT2, "x").max_position == 1024


def test_a_quantised_checkpoint_and_a_text_part_have_a_shape() -> None:
    quantised = {**LLAMA2_70B, "quantization_config": {"quant_method": "fp8"}}
    assert shape_of(quantised, "x") == shape_of(LLAMA2_70B, "x")
    assert shape_of({"model_type": "seeing", "text_config": LLAMA2_70B}, "x") == shape_of(LLAMA2_70B, "x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 7}, "not a multiple"),
    ],
)
def test_what_has_no_cost_model_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        shape_of({**MISTRAL, **change}, "config.json")


def test_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    assert model_shape(tmp_path) == model_shape(tmp_path / "config.json")
    with pytest.raises(UnsupportedModel, match=r"none\.json does not exist"):
        model_shape(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot be read as JSON"):
        model_shape(tmp_path / "bad.json")
