"""Small random checkpoints, written once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHECKPOINTS, COMMON
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)

Checkpoint = tuple[Path, Any]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """name -> (directory, transformers model in fp32, eval mode)."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            torch.manual_seed(len(name))
            fields = {**COMMON, **CHECKPOINTS[name]}
            config = AutoConfig.for_model(**fields)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if "norm" in key:
                        p.copy_(1 + 0.2 * torch.randn_like(p))
                    else:
                        p.copy_(torch.randn_like(p) * (0.5 if key.endswith("bias") else p.shape[-1] ** -0.5))
            directory = tmp_path_factory.mktemp("checkpoints") / name
            model.save_pretrained(directory)
            made[name] = (directory, model)
        return made[name]

    return make
