"""The requests of one run: when, what, how long. The same seed gives the same list, byte for byte."""

from pathlib import Path
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from evener.errors import InvalidInput
from evener.workload.arrivals import Times
from evener.workload.lengths import Lengths

_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city name team minute idea body back parent face level office door
"""
WORDS = _COMMON.split()
"""Common English words; nearly every tokenizer spends one token on each, with its leading space."""


class TimedRequest(Struct, frozen=True):
    """One request of a workload."""

    index: int
    arrival_s: float
    """Seconds from the start of the run; a closed loop does not look at it."""
    prompt: list[int] | str
    input_tokens: int
    """Length of the prompt: exact for token ids, nearly so for text."""
    output_tokens: int
    """Asked for: the cap, and with `ignore_eos` the exact number."""


class Prompts(Protocol):
    """Makes prompts of given length."""

    def draw(self, tokens: int, rng: np.random.Generator) -> list[int] | str:
        """A prompt of `tokens` tokens."""
        ...


class TokenIds(Struct, frozen=True):
    """Random token ids from [low, high), without those in `exclude`.

    The default range lies inside the vocabulary of every model with 32,000 tokens or more, and above the special
    ids that most of them keep at the bottom.
    """

    low: int = 100
    high: int = 32_000
    exclude: frozenset[int] = frozenset()

    def draw(self, tokens: int, rng: np.random.Generator) -> list[int]:
        """See `Prompts`."""
        if not self.exclude:
            return [int(i) for i in rng.integers(self.low, self.high, tokens)]
        allowed = self._allowed()
        return [int(i) for i in allowed[rng.integers(0, len(allowed), tokens)]]

    def _allowed(self) -> NDArray[np.int64]:
        ids = np.arange(self.low, self.high)
        allowed = ids[~np.isin(ids, list(self.exclude))]
        if not len(allowed):
            raise InvalidInput(f"token ids {self.low}:{self.high} are all special; widen --token-ids")
        return allowed


class Text(Struct, frozen=True):
    """Random common words, for servers that take no token ids. Lengths are then only nearly as asked."""

    def draw(self, tokens: int, rng: np.random.Generator) -> str:
        """See `Prompts`."""
        return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), tokens))


def parse_token_ids(spec: str) -> TokenIds:
    """`LOW:HIGH` -> ids from LOW up to, not including, HIGH (InvalidInput)."""
    low, _, high = spec.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise InvalidInput(f"--token-ids {spec!r} is not LOW:HIGH with 0 <= LOW < HIGH, as in 100:32000")
    return TokenIds(int(low), int(high))


def token_ids_of(tokenizer: Path) -> TokenIds:
    """All ids of a local Hugging Face tokenizer but its special and added ones (InvalidInput)."""
    from transformers import AutoTokenizer  # seconds to import, and most runs do not need it

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"no tokenizer can be loaded from {tokenizer}: {error}; name its folder") from error
    special = frozenset(loaded.all_special_ids) | frozenset(loaded.added_tokens_decoder)
    return TokenIds(0, loaded.vocab_size, special)


def build_requests(times: Times, inputs: Lengths, outputs: Lengths, prompts: Prompts, seed: int) -> list[TimedRequest]:
    """One request per arrival time. `seed` fixes lengths and prompts.

    Drawing order (part of the contract, so that other tools can make the same list from
    `numpy.random.default_rng(seed)`): all input lengths, all output lengths, then the prompts one by one.
    """
    rng = np.random.default_rng(seed)
    n = len(times)
    sizes = list(zip(inputs.draw(n, rng), outputs.draw(n, rng), strict=True))
    return [
        TimedRequest(k, float(times[k]), prompts.draw(int(i), rng), int(i), int(o)) for k, (i, o) in enumerate(sizes)
    ]
