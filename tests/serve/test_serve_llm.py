"""The offline API over a readable engine."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from fake import EOS, MODEL, FakeEngine, ids, tiny_tokenizer

from evener.errors import ContextTooLong, InvalidInput, InvalidRequest
from evener.llm import LLM, SamplingParams

PREPARED: Any = SimpleNamespace(source=SimpleNamespace(tokenizer=tiny_tokenizer, name=MODEL, eos_token_ids=(EOS,)))
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()

    async def start_engine(prepared: object) -> FakeEngine:
        assert prepared is PREPARED
        return fake

    monkeypatch.setattr("evener.llm.start_engine", start_engine)
    return fake


@pytest.fixture
def llm(engine: FakeEngine) -> Iterator[LLM]:
    with LLM(prepared=PREPARED) as made:
        yield made


def test_generate_gives_text_and_tokens_in_order(llm: LLM) -> None:
    texts, tokens = llm.generate(["the dog says", ids("hi")], [SamplingParams(max_tokens=3), SamplingParams(n=2)])
    assert tokens.prompt_token_ids == ids("hi") and [o.index for o in tokens.outputs] == [0, 1]
    assert [o.text for o in tokens.outputs] == [" hello to the fox"] * 2
    assert texts.outputs[0].token_ids == ids(" hello to the fox")[:3] and texts.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["model", "stream", "stream_options", "response_format", "user", "store", "metadata"])
def test_what_only_http_can_mean_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}'"):
        SamplingParams(**{name: "x"})


def test_a_value_outside_its_range_generates_nothing(llm: LLM, engine: FakeEngine) -> None:
    for params in (SamplingParams(temperature=-1), SamplingParams(stop=""), SamplingParams(stop_token_ids=[999])):
        with pytest.raises(InvalidRequest):
            llm.generate(["hi", "fox"], [SamplingParams(), params])
    assert not engine.submitted


def test_prepared_excludes_other_options(engine: FakeEngine) -> None:
    with pytest.raises(InvalidInput, match="leave out the others"):
        LLM(prepared=PREPARED, tensor_parallel_size=2)


def test_chat_from_many_threads_tokenises_in_none_of_them(llm: LLM, engine: FakeEngine) -> None:
    encode, seen = llm._front.vocabulary.encode, set()

    def spy(text: str, add_special_tokens: bool) -> list[int]:
        seen.add(threading.current_thread().name.partition("_")[0])
        return encode(text, add_special_tokens)

    llm._front.vocabulary.encode = spy  # type: ignore[method-assign]
    engine.max_model_len = 100_000
    long = [{"role": "user", "content": "the fox jumps " * 1000}]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(llm.chat, [USER, long] * 12))
    assert {out.outputs[0].text for out in got} == {" hello to the fox"}
    assert got[0].prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert got[0].prompt_token_ids == ids(got[0].prompt)
    assert seen == {"evener", "tokenise"}


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_tokenised(llm: LLM) -> None:
    llm._front.vocabulary.encode = None  # type: ignore[assignment, method-assign]
    with pytest.raises(ContextTooLong, match=r"256 tokens, but messages has at least \d+"):
        llm.chat([{"role": "user", "content": "the fox jumps " * 10_000}])
