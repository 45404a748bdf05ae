"""Qwen3, dense (Qwen3 technical report; transformers `Qwen3Config`): RMSNorm on each query and key head."""

from evener.model.families.base import Config, Family, dense_spec, refuse_sliding_window
from evener.spec.model import ModelSpec


def spec(config: Config) -> ModelSpec:
    """`head_dim` is free of hidden_size / heads; `attention_bias` biases all four projections."""
    refuse_sliding_window(config)
    bias = config.flag("attention_bias")
    return dense_spec(config, "qwen3", head_dim=128, max_position=32_768, qkv_bias=bias, o_bias=bias, qk_norm=True)


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3 (dense)", "qwen3", False, spec)
