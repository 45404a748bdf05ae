"""Runs batches on one shard: tokens or activations in, activations or sampled tokens out.

    first stage:  tokens -> embed -> layers -> send
    middle:       recv -> layers -> send
    last:         recv -> layers -> logits -> sample

Sampled tokens go from the last stage's first rank to every rank of the first stage directly, so that a decoding row's
successor starts without the host. With one stage both are the same ranks and nothing is sent.
"""

import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evener.engine.batch import Batch, BatchResult, TokenLogprobs
from evener.execute.live.sampler import Sampler
from evener.execute.live.slots import Sampling, Slots
from evener.execute.live.transport.base import Group, Pipe
from evener.execute.live.transport.pace import Pace
from evener.model.decoder import StageModel
from evener.model.inputs import Rows


class Wiring(NamedTuple):
    """The transports of one rank; None or empty where it has no such neighbour."""

    group: Group | None
    x_in: Pipe | None
    x_out: list[Pipe]
    tokens_in: Pipe | None
    tokens_out: list[Pipe]

    def close(self) -> None:
        """Release everything."""
        for part in [self.group, self.x_in, self.tokens_in, *self.x_out, *self.tokens_out]:
            if part is not None:
                part.close()


class _Expected(NamedTuple):
    batch_id: int
    slots: list[int]
    positions: list[int]


class Runner:
    """One shard's share of every batch of its replica, in issue order."""

    def __init__(
        self,
        model: StageModel,
        sampler: Sampler | None,
        slots: Slots,
        wiring: Wiring,
        pace: Pace,
        *,
        first: bool,
        last: bool,
        rank: int,
        hidden: int,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.slots = slots
        self.wiring = wiring
        self.pace = pace
        self.first = first
        self.last = last
        self.rank = rank
        self.hidden = hidden
        self._expected: deque[_Expected] = deque()
        self._sampled_in: dict[int, int] = {}
        """Slot -> newest batch that samples a token for it (first stage of several)."""

    @torch.inference_mode()
    def run(self, batch: Batch) -> BatchResult | None:
        """Run a batch; the result on the last stage's first rank, None elsewhere. Raises WorkerLost."""
        self._settle(batch)
        self.slots.apply(batch)
        if self.sampler is not None:
            for slot in batch.drop:
                self.sampler.drop(slot)
            for row in batch.new:
                assert row.tokens is not None
                self.sampler.add(row.slot, row.tokens, row.prompt_len, row.sampling)
        decode = self.slots.decoding(batch)
        if self.first and decode:
            self._receive_tokens(max(self._sampled_in.get(slot, -1) for slot in decode))
        rows, sampling, slots_T, positions_T = self.slots.rows(batch)
        if self.first:
            tokens = np.zeros(rows.n_rows, dtype=np.int64)
            tokens[: rows.n_real] = self.slots.tokens_NP[slots_T, positions_T]
            x = self.model.embed(torch.from_numpy(tokens), self.wiring.group)
        else:
            assert self.wiring.x_in is not None
            x = torch.empty(rows.n_rows, self.hidden)
            self.wiring.x_in.recv(x)
        x = self.model.run_layers(x, rows, self.wiring.group)
        for pipe in self.wiring.x_out:
            pipe.send(x)
        result = None
        if self.last:
            result = self._sample(batch, x, rows, sampling)
        elif self.first and sampling.slots:
            self._expected.append(_Expected(batch.batch_id, sampling.slots, sampling.positions))
            for slot in sampling.slots:
                self._sampled_in[slot] = batch.batch_id
        self.pace.pay()
        return result

    def _sample(self, batch: Batch, x: torch.Tensor, rows: Rows, sampling: Sampling) -> BatchResult | None:
        assert self.sampler is not None
        count = len(sampling.slots)
        prompt: dict[int, list[TokenLogprobs]] = {}
        tokens = np.zeros(0, dtype=np.int64)
        logprobs: dict[int, TokenLogprobs] = {}
        if len(rows.sample_S):
            logits = self.model.logits(x, rows.sample_S, self.wiring.group)
            if count:
                sampled = self.sampler.sample(logits[:count], sampling.slots, sampling.positions)
                tokens, logprobs = sampled.tokens.numpy(), sampled.logprobs
                self.sampler.note(sampling.slots, tokens.tolist())
                self.slots.note(sampling.slots, sampling.positions, tokens)
                if self.rank == 0:
                    for pipe in self.wiring.tokens_out:
                        pipe.send(torch.from_numpy(tokens))
            for slot, row, following in sampling.prompt:
                part = logits[count + row : count + row + len(following)]
                wanted = self.slots.params[slot].prompt_logprobs or 0
                prompt[slot] = self.sampler.prompt_logprobs(part, following, wanted)
        if self.rank != 0:
            return None
        return BatchResult(batch.batch_id, batch.epoch, tokens.tolist(), [], logprobs, prompt)

    def _settle(self, batch: Batch) -> None:
        """Take in tokens of slots that are about to be reused, and whatever else has arrived."""
        if self.wiring.tokens_in is None:
            return
        for slot in batch.drop:
            self._receive_tokens(self._sampled_in.pop(slot, -1))
        while self._expected and self.wiring.tokens_in.poll():
            self._receive_tokens(self._expected[0].batch_id)

    def _receive_tokens(self, up_to_batch: int) -> None:
        """Wait for the sampled tokens of all batches up to this one."""
        if self.wiring.tokens_in is None:
            return
        while self._expected and self._expected[0].batch_id <= up_to_batch:
            expected = self._expected.popleft()
            tokens: NDArray[np.int64] = np.empty(len(expected.slots), dtype=np.int64)
            self.wiring.tokens_in.recv(torch.from_numpy(tokens))
            self.slots.note(expected.slots, expected.positions, tokens)


def timed(runner: Runner, batch: Batch) -> tuple[BatchResult | None, int, int]:
    """Run a batch; its result and when it began and ended here (monotonic nanoseconds)."""
    started = time.monotonic_ns()
    result = runner.run(batch)
    return result, started, time.monotonic_ns()
