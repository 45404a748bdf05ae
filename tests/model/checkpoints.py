"""Shapes of the small random checkpoints: every family, and every option that changes the maths."""

from typing import Any

COMMON = {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 3,
          "max_position_embeddings": 256, "rms_norm_eps": 1e-5}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip

CHECKPOINTS: dict[str, dict[str, Any]] = {
    # 9 query heads over 3 KV heads, head_dim other than hidden / heads, tied: SmolLM2's shape
    "smol": {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16,
             "tie_word_embeddings": True},
    # biases on every projection, llama3 rope scaling, untied, no grouped queries
    "llama3": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10,
               "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3, "tie_word_embeddings": False},
    # the same with heads that the native kernels take, and whole groups of FFN columns
    "llama3-wide": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
                    "intermediate_size": 192, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3,
                    "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "tie_word_embeddings": False},
    "qwen3-bias": {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32,
                   "attention_bias": True, "tie_word_embeddings": True},
}  # fmt: skip
