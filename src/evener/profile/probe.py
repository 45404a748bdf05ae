"""The process that measures one device: `python -m evener.profile.probe`, pinned before torch is loaded.

It reads a `Setup` and then one `Ask` per line on its standard input, and answers each with one line on its standard
output; it ends with its input. Whatever libraries print goes to standard error.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from evener.profile.items import (
    AllReduce,
    Answer,
    Ask,
    DecodeAttention,
    Gemm,
    Item,
    OpOverhead,
    PrefillAttention,
    ReadBandwidth,
    Setup,
)
from evener.spec.model import QUANT_GROUP, ffn_group, kv_token_bytes, whole_group

if TYPE_CHECKING:
    import torch

    from evener.execute.live.transport.base import Group
    from evener.kernels import PackedWeight

CPU_LAYER, CUDA_LAYER = (576, 1536), (4096, 11008)
"""(hidden, ffn) of the layers that are measured; those of SmolLM2-135M and of Llama-2-7B."""
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
MOST_SEQUENCES = 64
MAX_POOL, MAX_KV = 512 << 20, 128 << 20
"""Bytes of weights and of KV that are gone through."""


class Unavailable(Exception):
    """This figure cannot be had here; the message says why."""


class Probe:
    """Measures on one device, with tensors that live between questions."""

    def __init__(self, setup: Setup) -> None:
        import torch

        self.torch, self.setup = torch, setup
        self.cuda = setup.kind == "cuda"
        self.device = torch.device("cuda", setup.index) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(len(setup.cores))
            from evener import kernels

            kernels.set_threads(len(setup.cores))
        self.pool_bytes = min(MAX_POOL, max(64 << 20, 3 * setup.cache_bytes))
        self._weights: tuple[str, list[list[PackedWeight]]] = ("", [])
        self._caches: tuple[str, list[tuple[torch.Tensor, torch.Tensor]]] = ("", [])
        self._at = 0
        self._slowest: dict[str, float] = {}
        self.wall_s = self.lost_s = 0.0
        """Time measured, and how much of it other processes had the core."""
        self._groups: dict[int, Group] = {}

    def answer(self, item: Item, budget_s: float) -> float:
        """The figure asked for. Raises Unavailable."""
        with self.torch.inference_mode():
            match item:
                case Gemm():
                    return self._gemm(item.dtype, item.rows, budget_s)
                case ReadBandwidth():
                    return self._bandwidth(budget_s)
                case PrefillAttention():
                    seconds, _ = self._attention(item.kv_dtype, 1, 512, 512, budget_s)
                    return 512 * 513 // 2 * HEADS * 4 * HEAD_DIM / seconds
                case DecodeAttention():
                    seconds, nbytes = self._attention(item.kv_dtype, MOST_SEQUENCES, 1, 512, budget_s)
                    return nbytes / seconds
                case OpOverhead():
                    return self._op_overhead(budget_s)
                case AllReduce():
                    return self._all_reduce(item, budget_s)

    def _seconds(self, call: Callable[[], object]) -> float:
        """Wall time of a call, without the time that its thread waited for its core while others had it."""
        if self.cuda:
            self.torch.cuda.synchronize()
        outer = time.perf_counter()
        waited = _run_queue_ns()
        start = time.perf_counter()
        call()
        if self.cuda:
            self.torch.cuda.synchronize()
        wall = time.perf_counter() - start
        waited = _run_queue_ns() - waited
        # What was waited beside the call, while the counter was read, must not be taken from the call.
        beside = time.perf_counter() - outer - wall
        lost = min(0.95 * wall, max(0.0, waited * 1e-9 - beside))
        self.wall_s += wall
        self.lost_s += lost
        return wall - lost

    def _typical(self, call: Callable[[], object], budget_s: float, at_least: int = 3) -> float:
        """Seconds of an undisturbed call, first one left out, over about `budget_s`."""
        call()
        took: list[float] = []
        until = time.perf_counter() + budget_s
        while len(took) < at_least or time.perf_counter() < until:
            took.append(self._seconds(call))
        return _quiet(took)

    # ---- GEMM ------------------------------------------------------------------------------------------------

    def _pool(self, dtype: str) -> list[list["PackedWeight"]]:
        """Weights of as many layers as exceed the cache: qkv, o, gate and up, down; kept for the next question."""
        from evener import kernels

        torch = self.torch
        if self._weights[0] != dtype:
            self._weights = ("", [])
            hidden, ffn = CUDA_LAYER if self.cuda else CPU_LAYER
            wide = whole_group(hidden)
            shapes = [(hidden * 5 // 3, hidden, wide), (hidden, hidden, QUANT_GROUP)]
            shapes += [(2 * ffn, hidden, wide), (hidden, ffn, ffn_group(ffn))]
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[dtype]
            layer_bytes = sum(n * k for n, k, _ in shapes) * kind.itemsize
            # On the CPU weights are made from fp32, as the workers make them.
            made = torch.float32 if not self.cuda else kind
            layers = [
                [kernels.pack_weight(torch.ones((n, k), dtype=made, device=self.device), kind, g) for n, k, g in shapes]
                for _ in range(-(-self.pool_bytes // layer_bytes))
            ]
            self._weights = (dtype, layers)
        return self._weights[1]

    def _gemm(self, dtype: str, rows: int, budget_s: float) -> float:
        from evener import kernels

        torch = self.torch
        pool = self._pool(dtype)
        taken = pool[0][0].data.dtype if self.cuda else torch.float32
        inputs = [torch.ones((rows, w.k), dtype=taken, device=self.device) for w in pool[0]]
        if dtype == "int8" and self.cuda:
            if not hasattr(torch, "_int_mm"):
                raise Unavailable("this torch has no int8 GEMM")
            call: Callable[[Any, Any], Any] = lambda x, w: torch._int_mm(x, w.data.t())  # noqa: E731
        else:
            call = kernels.linear  # what the workers run
        # Where a whole layer would take far too long, its smallest matrix stands for it.
        layer_s = 2 * rows * sum(w.n * w.k for w in pool[0]) / self._slowest.get(dtype, math.inf)
        parts = [1] if layer_s > 8 * budget_s else [0, 1, 2, 3]
        took: dict[int, list[float]] = {k: [] for k in parts}
        try:
            call(inputs[1], pool[0][1])
            until = time.perf_counter() + budget_s
            while len(took[1]) < (3 if len(parts) > 1 else 1) or time.perf_counter() < until:
                layer = pool[self._at % len(pool)]
                self._at += 1
                for k in parts:
                    took[k].append(self._seconds(partial(call, inputs[k], layer[k])))
        except (RuntimeError, NotImplementedError) as error:
            raise Unavailable(f"{dtype} GEMM of {rows} rows: {str(error).splitlines()[0]}") from error
        flop = 2 * rows * sum(pool[0][k].n * pool[0][k].k for k in parts)
        rate = flop / sum(_quiet(times) for times in took.values())
        self._slowest[dtype] = min(rate, self._slowest.get(dtype, math.inf)) if rows > 1 else rate
        return rate

    # ---- memory, attention, host -----------------------------------------------------------------------------

    def _bandwidth(self, budget_s: float) -> float:
        self._weights, self._caches = ("", []), ("", [])
        data = self.torch.ones(self.pool_bytes // 4, dtype=self.torch.float32, device=self.device)
        return data.nbytes / self._typical(lambda: data.sum(), budget_s)

    def _layers_kv(self, kv_dtype: str, blocks: int) -> list[tuple["torch.Tensor", "torch.Tensor"]]:
        """K and V of as many layers as exceed the cache, laid out as the workers' are; kept for the next question."""
        from evener.model.kv import KVSlabs

        if self._caches[0] != kv_dtype:
            self._weights, self._caches = ("", []), ("", [])
            torch = self.torch
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[kv_dtype]
            layer_bytes = 2 * KV_HEADS * blocks * BLOCK * kv_token_bytes(HEAD_DIM, kv_dtype)
            layers = -(-min(self.pool_bytes, MAX_KV) // layer_bytes)
            slabs = KVSlabs(layers, KV_HEADS, blocks, HEAD_DIM, self.device, kind)
            # Untouched pages would all be one page of zeros. These bytes are 0.011 in fp32 and bf16: no subnormals.
            slabs.k.view(torch.int8).fill_(0x3C)
            slabs.v.view(torch.int8).fill_(0x3C)
            self._caches = (kv_dtype, list(zip(slabs.k, slabs.v, strict=True)))
        return self._caches[1]

    def _attention(self, kv_dtype: str, sequences: int, count: int, keys: int, budget_s: float) -> tuple[float, int]:
        """(seconds, bytes of K and V) of a layer's attention: `sequences` chunks of `count` queries, the last of `keys`
        keys each, over a paged KV cache. Each call takes the next layer, as a model does."""
        from evener.kernels import paged_attention

        torch = self.torch
        per = -(-keys // BLOCK)
        layers = self._layers_kv(kv_dtype, MOST_SEQUENCES * per)
        made = layers[0][0].dtype if self.cuda and kv_dtype != "int8" else torch.float32
        q = torch.full((sequences * count, HEADS, HEAD_DIM), 0.01, device=self.device, dtype=made)
        out = torch.empty_like(q)
        ints = {"dtype": torch.int32, "device": self.device}
        cu = torch.arange(0, sequences + 1, **ints) * count
        start = torch.full((sequences,), keys - count, **ints)
        tables = torch.arange(sequences * per, **ints).reshape(sequences, per)
        group = torch.arange(HEADS, **ints) // (HEADS // KV_HEADS)

        def attend() -> None:
            k, v = layers[self._at % len(layers)]
            self._at += 1
            paged_attention(q, k, v, cu, start, tables, group.int(), HEAD_DIM**-0.5, out)

        try:
            seconds = self._typical(attend, budget_s)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise Unavailable(f"attention over {kv_dtype}: {str(error).splitlines()[0]}") from error
        return seconds, 2 * KV_HEADS * sequences * keys * kv_token_bytes(HEAD_DIM, kv_dtype)

    def _op_overhead(self, budget_s: float) -> float:
        torch = self.torch
        a, b = torch.ones(16, device=self.device), torch.ones(16, device=self.device)

        def thousand() -> None:
            for _ in range(1000):
                torch.add(a, b, out=b)

        return self._typical(thousand, budget_s) / 1000 * 1e9

    # ---- collectives -----------------------------------------------------------------------------------------

    def _all_reduce(self, item: AllReduce, budget_s: float) -> float:
        from evener.profile.collectives import join

        if self.setup.segment_fd is None:
            raise Unavailable("collectives: no segment was given")
        if item.group not in self._groups:
            joined = join(self.setup.segment_fd, self.setup.group_sizes, self.setup.rank)
            self._groups.update(joined)
        group = self._groups[item.group]
        data = self.torch.zeros(max(1, item.nbytes // 4))
        # Ranks must do equally many, so the number follows from the question, not from this rank's clock.
        rounds = max(20, min(500, round(budget_s / (20e-6 + item.nbytes * 1e-9))))
        stamps = [group.all_reduce(data) for _ in range(rounds + 3)][3:]
        return _quiet([float(s.ended - s.entered) for s in stamps])


def _quiet(took: list[float]) -> float:
    """Lower quartile: other work on the host only ever adds to a time."""
    return sorted(took)[len(took) // 4]


def _run_queue_ns() -> int:
    """Nanoseconds this thread has been runnable without running; 0 where the kernel does not count them."""
    try:
        with open("/proc/thread-self/schedstat") as f:  # noqa: PTH123 - called per sample, and Path is slower
            return int(f.read().split()[1])
    except (OSError, IndexError):
        return 0


def main() -> None:
    """Serve questions until the input ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    setup = msgspec.json.decode(lines.readline(), type=Setup)
    if setup.cores:
        os.sched_setaffinity(0, setup.cores)
    probe = Probe(setup)
    answers.write(msgspec.json.encode(Answer(value=1.0)) + b"\n")
    decoder = msgspec.json.Decoder(Ask)
    for line in lines:
        ask = decoder.decode(line)
        probe.wall_s = probe.lost_s = 0.0
        try:
            value = probe.answer(ask.item, ask.budget_s)
            reply = Answer(value=value, contended=probe.lost_s / probe.wall_s if probe.wall_s else 0.0)
        except Unavailable as error:
            reply = Answer(reason=str(error))
        answers.write(msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    main()
