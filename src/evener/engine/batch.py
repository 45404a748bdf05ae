"""What crosses from the brain to the workers: a batch of *changes*, and its result.

Workers hold sequence state by slot; they keep an ordered set of decoding slots per *group* (insertion order).
A batch applies, in this order: `drop`, `new`, `tables`, `leave`, `join`; then it computes the decode rows of
`group` (if `step`) followed by `chunks`; then it samples the decode rows and the chunks whose `sample` is set,
in that order. Cost is O(changes), not O(sequences).

The input of a decode row is the slot's newest token. When that token is still being computed by an earlier batch
(`after`), it travels worker to worker and the host is not involved.
"""

from msgspec import Struct

from evener.cost.base import BatchShape
from evener.engine.request import SamplingParams


class NewRow(Struct, frozen=True, array_like=True):
    """A sequence takes a slot. `tokens` are prompt and forced output tokens; None where only lengths are known."""

    slot: int
    tokens: list[int] | None
    n_tokens: int
    prompt_len: int
    """How many of the tokens are the client's prompt; the rest were emitted earlier and are forced (replay)."""
    sampling: SamplingParams
    request_id: str


class Chunk(Struct, frozen=True, array_like=True):
    """Tokens [start, start + count) of a slot's known tokens run through the model."""

    slot: int
    start: int
    count: int
    sample: bool
    """The chunk ends the known tokens, so its last position yields the next token."""


class Batch(Struct, frozen=True, array_like=True):
    """One unit of work for every stage of one replica, executed in issue order."""

    batch_id: int
    """Increasing per replica."""
    epoch: int
    group: int
    step: bool
    shape: BatchShape
    chunks: list[Chunk] = []
    new: list[NewRow] = []
    tables: list[tuple[int, list[int]]] = []
    """(slot, KV blocks appended to its table)."""
    join: list[int] = []
    """Slots appended to `group`."""
    leave: list[int] = []
    """Slots taken out of `group`."""
    drop: list[int] = []
    """Slots that are free for reuse."""
    pad_tokens: int = 0


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities (of the raw distribution, before temperature) at one position."""

    token: int
    logprob: float
    rank: int
    """1 is the most likely."""
    top: list[tuple[int, float]] = []


class BatchResult(Struct, frozen=True, array_like=True):
    """What the last stage reports. `tokens` has one entry per sampled row, decode rows first, then chunks.

    An executor that knows only lengths gives `tokens=None` and names the slots that reached their
    end-of-sequence in `ended`, with the number of output tokens before it.
    """

    batch_id: int
    epoch: int
    tokens: list[int] | None = None
    ended: list[tuple[int, int]] = []
    logprobs: dict[int, TokenLogprobs] = {}
    """Index into `tokens` -> logprobs, for rows that asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    """Slot -> entries for the positions this batch computed (the token *after* each position)."""
