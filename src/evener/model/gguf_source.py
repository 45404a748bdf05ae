"""A model in one GGUF file: metadata brought into config.json's keys, tensors under Hugging Face names.

No torch at module level: reading weights imports it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from evener.errors import UnsupportedModel
from evener.model.families import Config, base, family_of_gguf
from evener.model.gguf_file import GgufFile
from evener.model.gguf_tokenizer import load_tokenizer
from evener.model.source import ModelSource, check_tensors
from evener.spec.model import ModelSpec
from evener.spec.plan import Interval

if TYPE_CHECKING:
    import torch

# Hugging Face part -> GGUF part (gguf-py, tensor_mapping).
LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

ROPE_DIVISORS = "rope_freqs.weight"
QUANT_SUFFIX = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|MXFP4\w*|[BF]F?(16|32))$", re.IGNORECASE)


class GgufSource(ModelSource):
    """Weights mapped from a GGUF file and decoded piece by piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = QUANT_SUFFIX.sub("", path.stem)
        self.opened = self.stamp()  # before it is: a file that takes its place meanwhile is another one
        self._file = GgufFile(path)
        meta, where = self._file.metadata, str(path)
        arch = str(meta.get("general.architecture"))
        family = family_of_gguf(arch, where)
        if meta.get("split.count", 1) > 1:
            raise UnsupportedModel(
                f"{where} is one of {meta['split.count']} split files; merge them with llama.cpp's `gguf-split --merge`"
            )
        self._permuted = family.gguf_permutes_qk
        self.shapes = {hf_name(n): e.shape for n, e in self._file.tensors.items() if n != ROPE_DIVISORS}
        config = Config(config_of(meta, arch, family.name, self.shapes, where), where)
        self.spec = with_found_biases(family.spec(config), self.shapes)
        check_tensors(where, self.spec, self.shapes)

    def _read(self, name: str, rows: Interval, cols: Interval | None, dtype: "torch.dtype") -> "torch.Tensor":
        import torch

        stored = gguf_name(name)
        index: npt.NDArray[np.int64] | slice = slice(*rows)
        if self._permuted and (".q_proj." in name or ".k_proj." in name):
            index = interleaved_rows(*rows, self.spec.head_dim)
        return torch.from_numpy(self._file.rows(stored, index, cols or (0, self.shapes[name][0]))).to(dtype)

    def files(self) -> list[Path]:
        return [self.path]

    def rope_divisors(self) -> list[float] | None:
        if ROPE_DIVISORS not in self._file.tensors:
            return None
        divisors = self._file.rows(ROPE_DIVISORS, slice(None), (0, 0))
        if divisors.shape != (self.spec.head_dim // 2,):
            raise UnsupportedModel(
                f"{self.path}: {ROPE_DIVISORS} has shape {list(divisors.shape)}, expected [{self.spec.head_dim // 2}]"
            )
        return [float(x) for x in divisors]

    def _load_tokenizer(self) -> Any:
        return load_tokenizer(self._file.metadata, str(self.path), self.spec.max_position)

    def _config_eos(self) -> set[int]:
        # End of turn and end of message end an answer too (llama.cpp treats all three alike).
        keys = [f"tokenizer.ggml.{k}_token_id" for k in ("eos", "eot", "eom")]
        return {int(self._file.metadata[k]) for k in keys if k in self._file.metadata}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`; an unknown name comes back unchanged."""
    part, _, suffix = name.rpartition(".")
    if part in OUTER_PARTS:
        return f"{OUTER_PARTS[part]}.{suffix}"
    if (m := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part)) and m[2] in LAYER_PARTS:
        return f"blk.{m[1]}.{LAYER_PARTS[m[2]]}.{suffix}"
    return name


def hf_name(name: str) -> str:
    """The inverse of `gguf_name`."""
    part, _, suffix = name.rpartition(".")
    for hf, stored in OUTER_PARTS.items():
        if part == stored:
            return f"{hf}.{suffix}"
    if m := re.fullmatch(r"blk\.(\d+)\.(\w+)", part):
        for hf, stored in LAYER_PARTS.items():
            if m[2] == stored:
                return base.layer_name(int(m[1]), f"{hf}.{suffix}")
    return name


def interleaved_rows(a: int, b: int, head_dim: int) -> npt.NDArray[np.int64]:
    """File rows that hold rows [a, b) of q_proj or k_proj.

    Hugging Face rotates dimension j with j + D/2; llama.cpp's llama files are reordered so that the two stand side by
    side (convert_hf_to_gguf `permute`): row j of a head is stored at 2j, row j + D/2 at 2j + 1.
    """
    row = np.arange(a, b)
    head, i = np.divmod(row, head_dim)
    half, j = np.divmod(i, head_dim // 2)
    return np.asarray(head * head_dim + 2 * j + half, np.int64)


def with_found_biases(spec: ModelSpec, found: dict[str, base.Shape]) -> ModelSpec:
    """GGUF metadata is silent about biases: the tensors tell."""
    return msgspec.structs.replace(
        spec,
        qkv_bias=base.layer_name(0, "self_attn.q_proj.bias") in found,
        o_bias=base.layer_name(0, "self_attn.o_proj.bias") in found,
        mlp_bias=base.layer_name(0, "mlp.up_proj.bias") in found,
    )


def config_of(
    meta: dict[str, Any], arch: str, model_type: str, found: dict[str, base.Shape], where: str
) -> dict[str, Any]:
    """The keys of config.json from GGUF metadata. Raises UnsupportedModel for what has no counterpart here."""

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    hidden, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length")
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        head_dim = hidden // heads
    refused = {
        "expert_count": (get("expert_count", 0), 0),
        "attention.value_length": (get("attention.value_length", head_dim), head_dim),
        "rope.dimension_count": (get("rope.dimension_count", head_dim), head_dim),
        "attention.sliding_window": (get("attention.sliding_window", 0), 0),
        "rope.scaling.type": (get("rope.scaling.type", "none"), "none"),
        "rope.scale_linear": (get("rope.scale_linear", 1.0), 1.0),
        "attention.causal": (get("attention.causal", True), True),
    }
    for key, (value, only) in refused.items():
        if value != only:
            raise UnsupportedModel(f"{where}: {arch}.{key}={value!r} is not implemented (only {only!r})")
    vocab = found.get(base.EMBED, (None,))[0]
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "tie_word_embeddings": base.HEAD not in found,
    }
