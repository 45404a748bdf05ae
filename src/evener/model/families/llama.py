"""Llama: SmolLM2, Llama 2 and 3.x (Touvron et al. 2023; transformers `LlamaConfig`)."""

from evener.model.families.base import Config, Family, dense_spec
from evener.spec.model import ModelSpec


def spec(config: Config) -> ModelSpec:
    """`attention_bias` biases all four projections, `mlp_bias` all three."""
    bias = config.flag("attention_bias")
    mlp_bias = config.flag("mlp_bias")
    return dense_spec(config, "llama", max_position=2048, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


LLAMA = Family("llama", "LlamaForCausalLM", "SmolLM2, Llama 2, Llama 3.x", "llama", True, spec)
