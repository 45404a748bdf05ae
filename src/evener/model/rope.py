"""Rotary position embedding: cosine and sine tables (Su et al. 2021; llama3 scaling: Llama 3.1, transformers
`_compute_llama3_parameters`)."""

import math
from collections.abc import Sequence

import torch

from evener.spec.model import ModelSpec, RopeScaling


def rope_tables(
    spec: ModelSpec, max_position: int, divisors: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [max_position, head_dim / 2], fp32, for rotating dimension j with j + head_dim / 2.

    `divisors` [head_dim / 2], where the weights carry them, replace `spec.rope_scaling`.
    """
    exponent_D = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequency_D = 1.0 / (spec.rope_theta**exponent_D)
    if divisors is not None:
        frequency_D = frequency_D / torch.tensor(divisors, dtype=torch.float32)
    elif spec.rope_scaling is not None:
        frequency_D = scale_llama3(frequency_D, spec.rope_scaling)
    angle_PD = torch.outer(torch.arange(max_position, dtype=torch.float32), frequency_D)
    return angle_PD.cos(), angle_PD.sin()


def scale_llama3(frequency_D: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide low frequencies by `factor`, keep high ones, and blend in between. Radians per position, any shape."""
    wavelength_D = 2 * math.pi / frequency_D
    turns_D = scaling.original_max_position / wavelength_D
    smooth_D = (turns_D - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth_D = smooth_D.clamp(0.0, 1.0)  # 0: long waves, divided; 1: short waves, kept
    return (1 - smooth_D) * frequency_D / scaling.factor + smooth_D * frequency_D
