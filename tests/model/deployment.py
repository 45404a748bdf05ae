"""A plan run in this process: every rank is a thread, every stage a group of threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from evener.model.decoder import StageModel
from evener.model.inputs import Rows
from evener.model.source import ModelSource
from evener.spec.memory import BLOCK_TOKENS
from evener.spec.model import ModelSpec
from evener.spec.plan import Interval, Shard, Stage, split_even


class ThreadGroup:
    """all_reduce among threads; the sum is taken in rank order, so that every rank gets the same bits."""

    def __init__(self, size: int) -> None:
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def end(self, rank: int) -> "GroupEnd":
        return GroupEnd(self, rank)


class GroupEnd(NamedTuple):
    group: ThreadGroup
    rank: int

    def all_reduce(self, t: torch.Tensor) -> None:
        assert t.is_contiguous() and t.dtype == torch.float32
        self.group.parts[self.rank] = t.clone()
        self.group.barrier.wait()
        total = sum(self.group.parts[1:], start=self.group.parts[0])
        self.group.barrier.wait()
        t.copy_(total)


class Piece(NamedTuple):
    """Tokens of one sequence that run in one batch."""

    sequence: int
    start: int
    tokens: list[int]


class Deployment:
    """Stages of shards, with a cache for a few sequences whose blocks lie scattered."""

    def __init__(
        self, source: ModelSource, stages: list[Stage], max_len: int = 64, sequences: int = 4,
        dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype = torch.float32, spec: ModelSpec | None = None,
    ) -> None:  # fmt: skip
        """`spec`: the source's, changed."""
        self.stages, self.spec = stages, spec or source.spec
        per_sequence = -(-max_len // BLOCK_TOKENS)
        n_blocks = per_sequence * sequences + 1
        shuffled = torch.randperm(n_blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        self.tables = shuffled.view(sequences, per_sequence).to(torch.int32)
        self.models = [
            [
                StageModel(
                    source,
                    self.spec,
                    stage,
                    shard,
                    first_stage=s == 0,
                    last_stage=s == len(stages) - 1,
                    rank=r,
                    dtype=dtype,
                )
                for r, shard in enumerate(stage.shards)
            ]
            for s, stage in enumerate(stages)
        ]
        for model in (m for stage in self.models for m in stage):
            model.allocate_kv(n_blocks, kv_dtype)

    def run(self, batch: list[Piece], padding: int = 0) -> torch.Tensor:
        """Logits [T, vocab] of every row of the batch."""
        rows, tokens_T = self.rows(batch, padding)
        x_TH: torch.Tensor | None = None
        for s, models in enumerate(self.models):
            ends: list[Any] = [None]
            if len(models) > 1:
                group = ThreadGroup(len(models))
                ends = [group.end(r) for r in range(len(models))]

            def rank(r: int, s: int = s, models: Any = models, ends: Any = ends, x_TH: Any = x_TH) -> Any:
                x = models[r].embed(tokens_T, ends[r]) if s == 0 else x_TH.clone()
                x = models[r].run_layers(x, rows, ends[r])
                last = s == len(self.models) - 1
                return x, models[r].logits(x, rows.sample_S, ends[r]) if last else None

            with ThreadPoolExecutor(len(models)) as pool:
                done = list(pool.map(rank, range(len(models))))
            for x, _ in done[1:]:
                assert torch.equal(x, done[0][0]), "ranks of a stage must agree bit by bit"
            x_TH = done[0][0]
        return torch.cat([logits for _, logits in done], dim=1)

    def rows(self, batch: list[Piece], padding: int) -> tuple[Rows, torch.Tensor]:
        position, slot, tokens, cu = [], [], [], [0]
        for piece in batch:
            for i, token in enumerate(piece.tokens):
                p = piece.start + i
                position.append(p)
                slot.append(int(self.tables[piece.sequence, p // BLOCK_TOKENS]) * BLOCK_TOKENS + p % BLOCK_TOKENS)
                tokens.append(token)
            cu.append(len(tokens))
        n = len(tokens)
        int32 = torch.int32
        return Rows(
            positions_T=torch.tensor(position + [0] * padding, dtype=int32),
            cu_R=torch.tensor(cu, dtype=int32),
            start_R=torch.tensor([p.start for p in batch], dtype=int32),
            tables_RM=self.tables[[p.sequence for p in batch]].contiguous(),
            kv_slot_T=torch.tensor(slot + [-1] * padding, dtype=int32),
            sample_S=torch.arange(n),
            n_rows=n + padding,
            n_real=n,
        ), torch.tensor(tokens + [0] * padding)


def stages(
    spec: ModelSpec,
    *,
    layers: list[Interval] | None = None,
    heads: list[Interval] | None = None,
    ffn: list[Interval] | None = None,
    embed: list[Interval] | None = None,
    head: list[Interval] | None = None,
) -> list[Stage]:
    """The same split of heads and FFN for every stage; even where left out."""
    given = [x for x in (heads, ffn, embed, head) if x is not None]
    n = len(given[0]) if given else 1
    layers = layers or [(0, spec.layers)]
    heads, ffn = heads or list(split_even(spec.heads, n)), ffn or list(split_even(spec.ffn, n))
    embed, head = embed or list(split_even(spec.vocab, n)), head or list(split_even(spec.vocab, n))
    return [
        Stage(
            span,
            tuple(
                Shard(
                    f"cpu:{r}",
                    heads[r],
                    ffn[r],
                    embed[r] if s == 0 else (0, 0),
                    head[r] if s == len(layers) - 1 else (0, 0),
                )
                for r in range(n)
            ),
        )
        for s, span in enumerate(layers)
    ]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((got - want).abs().max() / want.abs().max())
