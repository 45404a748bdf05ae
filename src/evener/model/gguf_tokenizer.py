"""A transformers fast tokenizer from GGUF metadata. No torch.

Byte-level BPE is built straight from the vocabulary and merges in the file. transformers' own GGUF conversion
imports torch and splits by GPT-2's rule where it does not know the file's rule; here an unknown rule is refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

from evener.errors import UnsupportedModel
from evener.model.source import first_line

CONTROL, USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` of special tokens, and of plain ones that are still matched whole."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """How text is cut before merging."""

    pattern: str | None = None
    """Regular expression of the pieces; None: GPT-2's."""
    digits: bool = False
    """Every digit stands alone, before anything else."""
    ignore_merges: bool = False
    """A piece that is in the vocabulary is taken whole."""
    nfc: bool = False
    """Text is normalised to NFC first."""


# Names are llama.cpp's (`llama_vocab::impl::load`); rules are those of the models' own tokenizer.json.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "default": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "llama3": PreTokenizer(_LLAMA3, ignore_merges=True),
    "llama-v3": PreTokenizer(_LLAMA3, ignore_merges=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True),
    "qwen2": PreTokenizer(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True),
}


def load_tokenizer(metadata: dict[str, Any], where: str, max_length: int) -> Any:
    """The fast tokenizer that the file describes, with its chat template.

    `max_length` is the model's context in tokens. Raises UnsupportedModel when the file has no tokenizer, or one whose
    rules are unknown here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level_bpe(metadata, where, max_length)
    if kind == "llama":
        return _sentencepiece(where, max_length)
    raise UnsupportedModel(
        f"{where}: tokenizer.ggml.model={kind!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' "
        "(SentencePiece)"
    )


def _byte_level_bpe(metadata: dict[str, Any], where: str, max_length: int) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    name = get("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{where}: pre-tokenizer {name!r} is not known (known: {', '.join(PRE_TOKENIZERS)}); use the Hugging Face "
            "directory of this model"
        )
    rule = PRE_TOKENIZERS[name]
    tokens: list[str] = get("tokens", [])
    merges = [tuple(m.split(" ")) for m in get("merges", [])]
    if not tokens or not merges:
        raise UnsupportedModel(
            f"{where}: the file has no tokenizer.ggml.tokens and merges; use a file with a tokenizer"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    except Exception as error:  # tokenizers raises no narrower class
        raise UnsupportedModel(f"{where}: vocabulary and merges do not fit together ({error})") from error
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        ([pre_tokenizers.Digits(individual_digits=True)] if rule.digits else [])
        + ([pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated")] if rule.pattern else [])
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = get("token_type") or [1] * len(tokens)
    for type_, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types, strict=True) if k == type_
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)

    named = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = get(f"{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            named[f"{role}_token"] = tokens[token_id]
    before = [named["bos_token"]] if get("add_bos_token", False) and "bos_token" in named else []
    after = [named["eos_token"]] if get("add_eos_token", False) and "eos_token" in named else []
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False)]
        + [processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(t, vocab[t]) for t in {*before, *after}],
        )] * bool(before or after)
    )  # fmt: skip
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **named,
    )


def _sentencepiece(where: str, max_length: int) -> Any:
    """SentencePiece vocabularies (Llama 2): transformers' own conversion, which takes seconds and imports torch."""
    from transformers import AutoTokenizer

    path = Path(where)
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, model_max_length=max_length)
    except Exception as error:  # the conversion raises anything, down to bare Exception
        raise UnsupportedModel(
            f"{where}: its SentencePiece tokenizer cannot be converted ({first_line(error)})"
        ) from error
