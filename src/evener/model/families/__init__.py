"""The model families: each is one file that turns a config into a ModelSpec. No torch.

To add one that fits the decoder: write `families/<name>.py` with a `Family` and put it into `FAMILIES`.
"""

from evener.errors import UnsupportedModel
from evener.model.families.base import Config, Family
from evener.model.families.llama import LLAMA
from evener.model.families.qwen2 import QWEN2
from evener.model.families.qwen3 import QWEN3
from evener.spec.model import ModelSpec

FAMILIES: dict[str, Family] = {f.name: f for f in (LLAMA, QWEN2, QWEN3)}


def supported() -> str:
    """The supported families and their well-known members, for messages."""
    return "; ".join(f"{f.name} ({f.models})" for f in FAMILIES.values())


def family_of(config: Config) -> Family:
    """The family that `model_type` and `architectures` name. Raises UnsupportedModel listing the supported ones."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    architectures = config.get("architectures") or ([family.architecture] if family else [])
    if family is None or architectures != [family.architecture]:
        what = f"model_type={model_type!r}, architectures={architectures!r}"
        raise config.refuse(f"{what} is not supported; supported: {supported()}, as causal language models")
    return family


def family_of_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`. Raises UnsupportedModel listing the supported ones."""
    for family in FAMILIES.values():
        if family.gguf_arch == architecture:
            return family
    raise UnsupportedModel(f"{where}: GGUF architecture {architecture!r} is not supported; supported: {supported()}")


__all__ = ["FAMILIES", "Config", "Family", "ModelSpec", "family_of", "family_of_gguf", "supported"]
