"""What the families share: a careful reader of `config.json`, and the names of the weights. No torch.

Keys and defaults are those of Hugging Face `config.json` files; a GGUF file's metadata is brought into the same keys
(`evener.model.gguf_source`), so that a family is read in one way only.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from evener.errors import UnsupportedModel
from evener.spec.model import ModelSpec, RopeScaling

Shape = tuple[int, ...]


class Config:
    """A `config.json` read key by key. A missing, ill-typed or unsupported value raises UnsupportedModel."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def refuse(self, reason: str) -> UnsupportedModel:
        """The error to raise, naming the file."""
        return UnsupportedModel(f"{self.where}: {reason}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null."""
        value = self.raw.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if value is None:
            raise self.refuse(f"{key} is missing; a decoder cannot be built without it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(f"{key}={value!r} must be a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        return positive(self, key, self.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key}={value!r} must be true or false")
        return value


class Family(NamedTuple):
    """One architecture: how its config becomes a ModelSpec."""

    name: str
    """Key of `FAMILIES`, equal to `model_type` in config.json."""
    architecture: str
    """The entry of `architectures` in config.json."""
    models: str
    """Well-known members, for messages."""
    gguf_arch: str
    """`general.architecture` of its GGUF files."""
    gguf_permutes_qk: bool
    """GGUF files hold the rows of q and k in the order of interleaved rotation (llama.cpp's llama architecture)."""
    spec: Callable[[Config], ModelSpec]


def positive(config: Config, key: str, value: Any) -> float:
    """`value` as a positive float, or UnsupportedModel naming `key`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise config.refuse(f"{key}={value!r} must be a positive number")
    return float(value)


def rope(config: Config, default_theta: float = 10_000.0) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters` (transformers 5) or `rope_scaling`."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict) or any(isinstance(v, dict) for v in found.values()):
        raise config.refuse(f"rope_parameters={found!r} must be one flat mapping for all layers")
    kind = found.get("rope_type") or found.get("type") or "default"
    theta = positive(config, "rope_theta", found.get("rope_theta") or config.get("rope_theta", default_theta))
    partial = found.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise config.refuse(f"partial_rotary_factor={partial} is not implemented (only 1.0: whole heads rotate)")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise config.refuse(f"rope_type={kind!r} is not implemented (implemented: 'default', 'llama3')")
    missing = [k for k in ("factor", "low_freq_factor", "high_freq_factor") if k not in found]
    if missing:
        raise config.refuse(f"rope_type 'llama3' needs {', '.join(missing)}")
    factor, low, high = (positive(config, k, found[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if not high > low:
        raise config.refuse(f"rope high_freq_factor={high} must be greater than low_freq_factor={low}")
    original = found.get("original_max_position_embeddings") or config.count("max_position_embeddings")
    return theta, RopeScaling(factor, low, high, int(original))


def dense_spec(
    config: Config,
    family: str,
    *,
    head_dim: int | None = None,
    max_position: int,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """The spec of a pre-norm decoder with grouped-query attention and a gated SiLU feed-forward network.

    `head_dim` and `max_position` are the family's defaults for absent keys. Raises UnsupportedModel for
    what every family here lacks: other activations, sliding windows, quantised checkpoints.
    """
    if config.get("quantization_config"):
        method = config.get("quantization_config").get("quant_method", "unknown")
        raise config.refuse(
            f"quantization_config ({method}) is not implemented; use the bf16 checkpoint or a GGUF file"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.refuse(f"hidden_act={activation!r} is not implemented (only 'silu')")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    kv = config.count("num_key_value_heads", heads)
    if heads % kv:
        raise config.refuse(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv}")
    dim = config.count("head_dim", head_dim or max(1, hidden // heads))
    if dim % 2:
        raise config.refuse(f"head_dim={dim} is odd; rotary embedding needs pairs")
    theta, scaling = rope(config)
    return ModelSpec(
        family=family,
        vocab=config.count("vocab_size"),
        hidden=hidden,
        layers=config.count("num_hidden_layers"),
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        ffn=config.count("intermediate_size"),
        max_position=config.count("max_position_embeddings", max_position),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=config.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def refuse_sliding_window(config: Config) -> None:
    """Raise UnsupportedModel when any layer attends to a window only (Qwen's `use_sliding_window`)."""
    layer_types = config.get("layer_types")
    if layer_types is not None:
        other = sorted({str(t) for t in layer_types} - {"full_attention"})
        if other:
            raise config.refuse(f"layer_types has {', '.join(other)}; only full_attention is implemented")
    elif config.flag("use_sliding_window") and config.raw.get("sliding_window", 4096) is not None:
        first = config.get("max_window_layers", 28)
        if first < config.count("num_hidden_layers"):
            raise config.refuse(
                f"sliding-window attention (from layer {first} on) is "
                "not implemented; set use_sliding_window to false if the context stays below the window"
            )


EMBED, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layer_name(layer: int, part: str) -> str:
    """Hugging Face name of one layer's tensor: (3, "mlp.up_proj.weight") -> "model.layers.3.mlp.up_proj.weight"."""
    return f"model.layers.{layer}.{part}"


def tensors(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of the model, under Hugging Face names."""
    q, kv, hidden, ffn = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.hidden, spec.ffn
    projections: list[tuple[str, Shape, bool]] = [
        ("self_attn.q_proj", (q, hidden), spec.qkv_bias),
        ("self_attn.k_proj", (kv, hidden), spec.qkv_bias),
        ("self_attn.v_proj", (kv, hidden), spec.qkv_bias),
        ("self_attn.o_proj", (hidden, q), spec.o_bias),
        ("mlp.gate_proj", (ffn, hidden), spec.mlp_bias),
        ("mlp.up_proj", (ffn, hidden), spec.mlp_bias),
        ("mlp.down_proj", (hidden, ffn), spec.mlp_bias),
    ]
    yield EMBED, (spec.vocab, hidden)
    for layer in range(spec.layers):
        yield layer_name(layer, "input_layernorm.weight"), (hidden,)
        yield layer_name(layer, "post_attention_layernorm.weight"), (hidden,)
        if spec.qk_norm:
            yield layer_name(layer, "self_attn.q_norm.weight"), (spec.head_dim,)
            yield layer_name(layer, "self_attn.k_norm.weight"), (spec.head_dim,)
        for part, shape, bias in projections:
            yield layer_name(layer, part + ".weight"), shape
            if bias:
                yield layer_name(layer, part + ".bias"), shape[:1]
    yield FINAL_NORM, (hidden,)
    if not spec.tied:
        yield HEAD, (spec.vocab, hidden)
