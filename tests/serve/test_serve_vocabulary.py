"""The tokenizer of the default model: every token's bytes, as transformers decodes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.model.source import open_model
from evener.serve.detokenize import Detokenizer
from evener.serve.vocabulary import Vocabulary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(open_model(None).tokenizer())


def test_every_token_alone(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer
    size = len(tokenizer.get_vocab())
    assert [vocabulary.decode([t]) for t in range(size)] == tokenizer.batch_decode([[t] for t in range(size)])


@given(tokens=st.lists(st.integers(0, 49151), max_size=30), skip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_tokens_in_any_order(vocabulary: Vocabulary, tokens: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=skip)
    pieces = [detokenizer.feed(t) for t in tokens]
    whole = vocabulary.tokenizer.decode(tokens, skip_special_tokens=skip)
    assert "".join(pieces) + detokenizer.finish() == whole


@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_there_and_back_as_the_tokenizer_does(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.encode(text, add_special_tokens=True)
    assert tokens == vocabulary.tokenizer.encode(text)
    # Not always the text itself: this vocabulary lacks the tokens of some bytes, such as those that begin U+40000.
    assert vocabulary.decode(tokens) == vocabulary.tokenizer.decode(tokens)


@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_length_check_never_refuses_what_fits(vocabulary: Vocabulary, text: str) -> None:
    # Control characters are left out: the vocabulary lacks some of their bytes.
    assert len(vocabulary.encode(text, add_special_tokens=True)) * vocabulary.longest >= len(text.encode())
