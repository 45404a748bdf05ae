"""The shape of a model from its `config.json` alone: to plan and simulate without weights. No torch.

A family that Evener serves is read as it would be to serve it. Any other decoder is read by the keys that
configurations commonly use; its spec says enough to plan and simulate, and `evener serve` refuses it as before.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evener.errors import UnsupportedModel
from evener.model.families import FAMILIES
from evener.model.families.base import Config
from evener.spec.model import ModelSpec

_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "max_sequence_length"),
}
_PLAIN_FFN = {
    "bloom", "gpt2", "gpt_neox", "gpt_neo", "gptj", "gpt_bigcode", "opt", "falcon", "mpt", "phi", "starcoder2",
    "RefinedWeb",
}  # fmt: skip
"""Model types whose feed-forward network has two matrices: up and down, no gate."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LONGEST = 2048
"""Positions of a config that does not say, such as BLOOM's: it was trained on so many."""


def model_shape(path: str | Path) -> ModelSpec:
    """The spec of a `config.json`, or of a directory that has one. Raises UnsupportedModel that names the file."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{file} does not exist; name a config.json or a directory that has one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnsupportedModel(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"{file} must hold one JSON object, the configuration of a model")
    return shape_of(raw, str(file))


def shape_of(raw: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec of a parsed configuration. Raises UnsupportedModel for experts, latent attention, missing sizes."""
    nested = raw.get("text_config")
    if isinstance(nested, dict) and "hidden_size" not in raw:
        raw = nested
    # How weights are stored does not change the shape; plans and simulations name their own dtype.
    config = Config({k: v for k, v in raw.items() if k != "quantization_config"}, where)
    experts = next((key for key in _EXPERTS if (config.get(key) or 0) > 1), None)
    if experts is not None:
        raise config.refuse(f"{experts}={config.get(experts)}: mixtures of experts have no cost model yet")
    if config.get("kv_lora_rank"):
        raise config.refuse("kv_lora_rank: latent attention has no cost model yet")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        return family.spec(config)
    return _generic(config)


def _generic(config: Config) -> ModelSpec:
    kind = str(config.get("model_type", "unknown"))
    common = Config({**config.raw, **_translated(config)}, config.where)
    hidden, heads = common.count("hidden_size"), common.count("num_attention_heads")
    kv = 1 if config.get("multi_query") is True else common.count("num_key_value_heads", heads)
    if heads % kv:
        raise config.refuse(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv}")
    plain = kind in _PLAIN_FFN
    columns = common.count("intermediate_size", 4 * hidden) if plain else common.count("intermediate_size")
    return ModelSpec(
        family=kind,
        vocab=common.count("vocab_size"),
        hidden=hidden,
        layers=common.count("num_hidden_layers"),
        heads=heads,
        kv_heads=kv,
        head_dim=common.count("head_dim", max(1, hidden // heads)),
        # Two matrices of 4h hold as many weights as three of 8h/3.
        ffn=round(columns * 2 / 3) if plain else columns,
        max_position=common.count("max_position_embeddings", _LONGEST),
        tied=common.flag("tie_word_embeddings", kind in _PLAIN_FFN),
    )


def _translated(config: Config) -> dict[str, Any]:
    out = {}
    for key, names in _ALIASES.items():
        if config.get(key) is None:
            given = next((config.get(name) for name in names if config.get(name) is not None), None)
            if given is not None:
                out[key] = given
    return out
