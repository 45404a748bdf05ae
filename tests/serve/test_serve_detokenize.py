"""Law: however tokens arrive, the pieces join to the whole text, and no stop string is in it."""

import pytest
from fake import EOS, VOCAB, ids, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from evener.errors import UnsupportedModel
from evener.serve.detokenize import Detokenizer
from evener.serve.vocabulary import Vocabulary

VOCABULARY = Vocabulary(tiny_tokenizer())
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
# Few letters, so that stop strings begin, break off and overlap often.
TEXTS = st.text("abc \U0001f999é", max_size=30)


def pieces(tokens: list[int], **options: object) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(VOCABULARY, **options)
    out = []
    for token in tokens:
        out.append(detokenizer.feed(token))
        if detokenizer.stop is not None:
            return out, detokenizer
    return [*out, detokenizer.finish()], detokenizer


@given(TOKENS, st.booleans())
@settings(max_examples=80, deadline=None)
def test_pieces_join_to_the_full_decode(tokens: list[int], skip: bool) -> None:
    out, detokenizer = pieces(tokens, skip_special_tokens=skip)
    whole = tiny_tokenizer().decode(tokens, skip_special_tokens=skip)
    assert "".join(out) == whole == VOCABULARY.decode(tokens, skip)
    assert detokenizer.emitted == detokenizer.decoded == len(whole)


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_no_piece_breaks_a_character(text: str) -> None:
    out, _ = pieces(ids(text))
    assert "".join(out) == text
    assert "\ufffd" not in "".join(out)


@given(TEXTS, st.lists(st.text("abc \U0001f999é", min_size=1, max_size=4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_text_ends_at_the_first_stop_string(text: str, stops: list[str], include: bool) -> None:
    out, detokenizer = pieces(ids(text), stops=tuple(stops), include_stop=include)
    got = "".join(out)
    ends = [(at + len(s), at, s) for s in stops if (at := text.find(s)) >= 0]
    if not ends:
        assert got == text
        assert detokenizer.stop is None
        return
    end, start, first = min(ends)
    assert detokenizer.stop == first
    assert got == text[: end if include else start]
    assert include or not any(s in got for s in stops)


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known() -> None:
    detokenizer = Detokenizer(VOCABULARY, stops=("STOP",))
    assert [detokenizer.feed(t) for t in (*ids("x"), *ids("S"), *ids("T"), *ids("x"))] == ["x", "", "", "STx"]


def test_special_tokens_are_skipped_unless_wanted() -> None:
    tokens = [*ids("a"), EOS, *ids("b")]
    assert "".join(pieces(tokens)[0]) == "ab"
    assert "".join(pieces(tokens, skip_special_tokens=False)[0]) == "a<|im_end|>b"


def test_a_space_at_the_start_of_the_answer_is_kept() -> None:
    assert "".join(pieces(ids(" fox"))[0]) == " fox"


def test_labels_show_bytes_where_a_token_is_no_whole_character() -> None:
    first = next(t for t in range(VOCAB) if VOCABULARY.bytes_of(t) == b"\xf0")
    assert VOCABULARY.label(first) == "bytes:\\xf0"
    assert [VOCABULARY.label(t) for t in ids(" fox")] == [" fox"]
    assert VOCABULARY.bytes_of(VOCAB - 1) == b""


def sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "\u2581fox": 1, "es": 2, "<0xC3>": 3, "<0xA9>": 4}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_sentencepiece_with_byte_fallback() -> None:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    vocabulary = Vocabulary(sentencepiece(decoders.Sequence(steps)))
    assert vocabulary.decode([1, 2, 3, 4]) == " foxesé"


def test_an_unknown_kind_of_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Vocabulary(sentencepiece(decoders.WordPiece()))
