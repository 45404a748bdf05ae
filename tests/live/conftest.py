"""A tiny model with SmolLM2's tokenizer and its 9/3 heads, so that real processes start and run in seconds."""

from pathlib import Path

import pytest
import torch

from evener.model.source import open_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: 4 layers, 9 query and 3 KV heads, hidden 72."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = open_model(None).tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=72, intermediate_size=160, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
