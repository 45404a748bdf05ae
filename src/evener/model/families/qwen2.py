"""Qwen2 and Qwen2.5 (Qwen2 technical report; transformers `Qwen2Config`): biases on q, k and v, none on o."""

from evener.model.families.base import Config, Family, dense_spec, refuse_sliding_window
from evener.spec.model import ModelSpec


def spec(config: Config) -> ModelSpec:
    """The biases are not in the config: they always exist."""
    refuse_sliding_window(config)
    return dense_spec(config, "qwen2", max_position=32_768, qkv_bias=True)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5", "qwen2", False, spec)
