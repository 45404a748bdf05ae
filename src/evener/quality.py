"""What a narrower dtype costs in quality: perplexity, divergence and agreement against fp32, on one text.

Both sides are this project's own decoder on one CPU, teacher-forced over the same windows of the same tokens, so that
the difference is the dtype's alone. (That the fp32 side is right is `evener.verify`'s business.)
"""

import ast
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from msgspec import Struct

from evener import kernels
from evener.errors import InvalidInput
from evener.model.decoder import TORCH_DTYPE, StageModel
from evener.model.inputs import Rows
from evener.model.source import ModelSource, open_model
from evener.spec.memory import BLOCK_TOKENS
from evener.spec.plan import Shard, Stage

PERPLEXITY_LIMIT = 1.01
"""Perplexity over that of fp32 that a dtype may reach."""


class Quality(Struct, frozen=True):
    """One dtype of weights and KV cache against fp32."""

    dtype: str
    kv_dtype: str
    passed: bool
    """`perplexity_ratio` <= PERPLEXITY_LIMIT."""
    perplexity_ratio: float
    perplexity: float
    perplexity_fp32: float
    kl: float
    """Mean KL divergence from fp32's next-token distribution, nats."""
    top1_agreement: float
    """Share of positions where both have the same best token."""
    positions: int
    text: str
    """Where the text is from, and the first digits of its SHA-256."""
    isa: str
    """Instruction set of the kernels: int8 products have 8-bit inputs with VNNI and 16-bit inputs without."""


def default_text() -> tuple[str, str]:
    """(text, where it is from): the docstrings of this package's modules, in the order of their paths.

    English prose that ships with every installation and no model was trained on.
    """
    root = Path(__file__).parent
    parts = []
    for file in sorted(root.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        parts += [doc for node in ast.walk(tree) if isinstance(node, documented) and (doc := ast.get_docstring(node))]
    return "\n\n".join(parts), "docstrings of evener"


def measure_quality(
    model: str | ModelSource | None = None,
    *,
    settings: tuple[tuple[str, str], ...] = (("int8", "int8"),),
    text: str | None = None,
    named: str = "given text",
    tokens: int = 4096,
    window: int = 512,
) -> list[Quality]:
    """Compare each (dtype, kv_dtype) with fp32 over the first `tokens` tokens of a text, in windows of `window`.

    Every window starts without context. Raises InvalidInput for an unknown dtype or a text that is too short.
    """
    for dtype in {d for pair in settings for d in pair}:
        if dtype not in TORCH_DTYPE:
            raise InvalidInput(f"dtype {dtype!r} is not one of {', '.join(TORCH_DTYPE)}")
    source = model if isinstance(model, ModelSource) else open_model(model)
    if text is None:
        text, named = default_text()
    ids: list[int] = source.tokenizer()(text, verbose=False)["input_ids"][:tokens]
    window = min(window, source.spec.max_position)
    if window < 2 or len(ids) < window:
        raise InvalidInput(
            f"{len(ids)} tokens of text in windows of {window}; give a longer text, windows of at least 2"
        )
    windows = [ids[at : at + window] for at in range(0, len(ids) - 1, window) if len(ids) - at >= 2]
    where = f"{named}, {len(ids)} tokens, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    sums = [_Sums() for _ in settings]
    runs = [_logprobs(source, dtype, kv_dtype, windows) for dtype, kv_dtype in (("fp32", "fp32"), *settings)]
    for ids, exact_TV, *others in zip(windows, *runs, strict=True):  # all models in memory, one window at a time
        for total, got_TV in zip(sums, others, strict=True):
            total.add(torch.tensor(ids[1:]), exact_TV, got_TV)
    return [total.result(*pair, where) for total, pair in zip(sums, settings, strict=True)]


class _Sums:
    """Running sums over the windows of one setting."""

    def __init__(self) -> None:
        self.loss = self.loss_fp32 = self.kl = 0.0
        self.same = self.positions = self.predicted = 0

    def add(self, next_T: torch.Tensor, exact_TV: torch.Tensor, got_TV: torch.Tensor) -> None:
        """One window: the tokens that follow, and both log-probabilities."""
        next_T1 = next_T.unsqueeze(1)
        self.loss -= float(got_TV[:-1].gather(1, next_T1).double().sum())
        self.loss_fp32 -= float(exact_TV[:-1].gather(1, next_T1).double().sum())
        self.kl += float((exact_TV.exp() * (exact_TV - got_TV)).sum(-1).double().sum())
        self.same += int((exact_TV.argmax(-1) == got_TV.argmax(-1)).sum())
        self.positions += exact_TV.shape[0]
        self.predicted += len(next_T)

    def result(self, dtype: str, kv_dtype: str, where: str) -> Quality:
        """What the sums come to."""
        ratio = math.exp((self.loss - self.loss_fp32) / self.predicted)
        return Quality(
            dtype=dtype, kv_dtype=kv_dtype, passed=ratio <= PERPLEXITY_LIMIT, perplexity_ratio=ratio,
            perplexity=math.exp(self.loss / self.predicted),
            perplexity_fp32=math.exp(self.loss_fp32 / self.predicted), kl=self.kl / self.positions,
            top1_agreement=self.same / self.positions, positions=self.positions, text=where, isa=kernels.isa(),
        )  # fmt: skip


@torch.inference_mode()
def _logprobs(source: ModelSource, dtype: str, kv_dtype: str, windows: list[list[int]]) -> Iterator[torch.Tensor]:
    """Log-probabilities [T, V] of each window, from one shard that holds the whole model."""
    spec = source.spec
    shard = Shard("cpu:0", (0, spec.heads), (0, spec.ffn), (0, spec.vocab), (0, spec.vocab))
    longest = max(len(ids) for ids in windows)
    model = StageModel(
        source, spec, Stage((0, spec.layers), (shard,)), shard, first_stage=True, last_stage=True, rank=0,
        dtype=TORCH_DTYPE[dtype], max_position=longest,
    )  # fmt: skip
    blocks = -(-longest // BLOCK_TOKENS)
    model.allocate_kv(blocks, TORCH_DTYPE[kv_dtype])
    for ids in windows:
        n = len(ids)
        position_T = torch.arange(n, dtype=torch.int32)
        rows = Rows(
            positions_T=position_T, cu_R=torch.tensor([0, n], dtype=torch.int32),
            start_R=torch.zeros(1, dtype=torch.int32), tables_RM=torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
            kv_slot_T=position_T, sample_S=torch.arange(n), n_rows=n, n_real=n,
        )  # fmt: skip
        x_TH = model.run_layers(model.embed(torch.tensor(ids), None), rows, None)
        yield torch.log_softmax(model.logits(x_TH, rows.sample_S), -1)
