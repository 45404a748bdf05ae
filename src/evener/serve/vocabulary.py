"""Text to tokens and back: what the front needs of a Hugging Face fast tokenizer, bytes exact."""

import json
import re
from typing import Any, Protocol

from evener.errors import UnsupportedModel

_BYTE_PIECE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Tokenizer(Protocol):
    """The part of transformers' `PreTrainedTokenizerFast` that the front uses."""

    chat_template: Any
    backend_tokenizer: Any
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id, added tokens included."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """Render messages; a string with `tokenize=False`."""
        ...


class Vocabulary:
    """Encodes text and gives the exact bytes of every token.

    Byte-level BPE (Llama 3, Qwen, SmolLM) and SentencePiece with byte fallback (Llama 2) are understood.
    The methods are safe to call from several threads: nothing in the tokenizer is changed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UnsupportedModel when the tokenizer's decoder is of another kind."""
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._byte_level = _is_byte_level(self._backend)
        self._special = set(tokenizer.all_special_ids)
        self._special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._bytes: dict[int, bytes] = {}
        self.longest = max(len(self.bytes_of(token)) for token in tokenizer.get_vocab().values())
        """No token stands for more bytes than this."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model wants around it (BOS)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def is_special(self, token: int) -> bool:
        """Control tokens, such as the end of a turn."""
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes the token adds to the text, which may begin or end within a character.

        Ids between the tokenizer's size and the model's padded vocabulary have no text: b"".
        """
        known = self._bytes.get(token)
        if known is None:
            piece = self._backend.id_to_token(token)
            known = self._bytes[token] = b"" if piece is None else self._piece_bytes(piece)
        return known

    def label(self, token: int) -> str:
        """The token as logprobs show it: its text, or `bytes:\\xf0\\x9f` where it is no whole UTF-8."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        """Text of whole token lists; broken UTF-8 becomes U+FFFD."""
        kept = (t for t in tokens if not (skip_special_tokens and self.is_special(t)))
        return b"".join(map(self.bytes_of, kept)).decode(errors="replace")

    def _piece_bytes(self, piece: str) -> bytes:
        if self._byte_level:
            # A piece with a character outside the alphabet is an added token, written as it is.
            return bytes(_ALPHABET[c] for c in piece) if all(c in _ALPHABET for c in piece) else piece.encode()
        fallback = _BYTE_PIECE.match(piece)
        return bytes([int(fallback[1], 16)]) if fallback else piece.replace("\u2581", " ").encode()


def _is_byte_level(backend: Any) -> bool:
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    kinds = {d["type"] for d in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        return True
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return False
    raise UnsupportedModel(
        f"the tokenizer decodes with {', '.join(sorted(kinds))}; supported are ByteLevel (Llama 3, Qwen, SmolLM) "
        "and ByteFallback or Metaspace (SentencePiece)"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    return table | {chr(0x100 + k): b for k, b in enumerate(others)}


_ALPHABET = _byte_alphabet()
