"""Shapes of the models in validation.csv, as their `config.json` on the Hugging Face hub gives them."""

from evener.model.shapes import shape_of
from evener.spec.model import ModelSpec

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_LLAMA3_ROPE = {"rope_theta": 500000.0, "max_position_embeddings": 131072, "vocab_size": 128256}
CONFIGS = {
    # meta-llama/Llama-2-70b-hf
    "llama2-70b": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    # bigscience/bloom: 70 layers of 14336, 112 heads, a plain FFN of four times the width
    "bloom-176b": {
        "model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880,
        "seq_length": 2048,
    },
    # meta-llama/Llama-3.1-70B
    "meta-llama/Llama-3.1-70B": {
        **_LLAMA, **_LLAMA3_ROPE, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    # meta-llama/Llama-3.1-8B
    "meta-llama/Llama-3.1-8B": {
        **_LLAMA, **_LLAMA3_ROPE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    # Qwen/Qwen3-32B
    "Qwen/Qwen3-32B": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 25600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960,
    },
}  # fmt: skip
CONFIGS["meta-llama/Llama-3.1-8B-Instruct"] = CONFIGS["meta-llama/Llama-3.1-8B"]


def model_of(name: str) -> ModelSpec | None:
    """The shape; None for a model that has no cost model yet (mixtures of experts)."""
    return shape_of(CONFIGS[name], name) if name in CONFIGS else None
