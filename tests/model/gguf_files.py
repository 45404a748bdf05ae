"""GGUF files written from small checkpoints, the way llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from evener.model.gguf_source import gguf_name


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows for interleaved rotation."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write(path: Path, model: Any, kind: Kind = Kind.F32, **overrides: Any) -> Path:
    """Write a transformers model; matrices as `kind`, vectors as F32. `overrides`: metadata under the architecture."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key, value in overrides.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{arch}.{key.replace('__', '.')}", value)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    for name, value in stored(model).items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(model: Any) -> dict[str, np.ndarray]:
    """Tensors under GGUF names, in the file's row order, fp32."""
    config, out = model.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = parameter.detach().numpy()
        for part, n in heads.items():
            if part in name and config.model_type == "llama":
                value = permute(value, n)
        out[gguf_name(name)] = np.ascontiguousarray(value)
    return out
