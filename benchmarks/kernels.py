"""Native CPU kernels against torch: paged attention at the hardware's pace, cheap row kernels and sampling scans.

    benchmarks/kernels.py [--rounds 9] [--threads 1] [--isa avx2]

Every case runs natively and in torch, in alternation; `torch/native` is the median over the rounds of torch's time over
the native time. Torch's attention is scaled_dot_product_attention, sequence by sequence, on keys and values that are
already gathered (the gathering is not timed). `GFLOP/s` counts 4 * D per (query head, key) pair; `GB/s` the bytes that
must move once: K and V for attention, input and output for the rest. CPU time on one thread, wall time on several.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from common import markdown, save
from evener import kernels

BLOCK = 16


@dataclass
class Case:
    """One measurement: the same work natively and in torch."""

    name: str
    native: Callable[[], object]
    torch: Callable[[], object]
    bytes: float
    flops: float = 0.0


def attention(name: str, chunks: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, huge: bool) -> Case:
    """Chunks of (start, count), each a sequence of its own with its blocks all over the slab."""
    n_blocks = [-(-(start + count) // BLOCK) for start, count in chunks]
    total = sum(n_blocks)
    k_slab, v_slab = torch.empty(kv_heads, total, dim, BLOCK), torch.empty(kv_heads, total, BLOCK, dim)
    if huge:
        kernels.advise_huge_pages(k_slab)
        kernels.advise_huge_pages(v_slab)
    k_slab.normal_()
    v_slab.normal_()
    order = torch.randperm(total).to(torch.int32)
    tables_RM = torch.zeros(len(chunks), max(n_blocks), dtype=torch.int32)
    cu_R = torch.tensor([0] + [count for _, count in chunks]).cumsum(0).to(torch.int32)
    start_R = torch.tensor([start for start, _ in chunks], dtype=torch.int32)
    q_TQD = torch.randn(int(cu_R[-1]), heads, dim)
    out_TQD = torch.empty_like(q_TQD)
    kv_of_head = (torch.arange(heads) // (heads // kv_heads)).to(torch.int32)
    gathered: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    for r, (start, count) in enumerate(chunks):
        own = order[sum(n_blocks[:r]) :][: n_blocks[r]]
        tables_RM[r, : n_blocks[r]] = own
        keys = start + count
        k_HKD = k_slab[:, own.long()].permute(0, 1, 3, 2).reshape(kv_heads, -1, dim)[:, :keys].contiguous()
        v_HKD = v_slab[:, own.long()].reshape(kv_heads, -1, dim)[:, :keys].contiguous()
        q_HTD = q_TQD[cu_R[r] : cu_R[r + 1]].transpose(0, 1).contiguous()
        mask = None
        if count > 1 and start:
            mask = torch.arange(keys) <= torch.arange(start, keys).unsqueeze(1)
        gathered.append((q_HTD.unsqueeze(0), k_HKD.unsqueeze(0), v_HKD.unsqueeze(0), mask))

    def native() -> None:
        kernels.paged_attention(q_TQD, k_slab, v_slab, cu_R, start_R, tables_RM, kv_of_head, dim**-0.5, out_TQD)

    def by_torch() -> None:
        for q, k, v, mask in gathered:
            causal = mask is None and q.shape[2] > 1
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    pairs = sum(count * start + count * (count + 1) / 2 for start, count in chunks)
    keys = sum(start + count for start, count in chunks)
    return Case(name, native, by_torch, keys * kv_heads * dim * 8.0, pairs * heads * dim * 4.0)


def row_cases() -> list[Case]:
    """The kernels beside attention, at the sizes of SmolLM2-135M, for one decoding row and for a chunk of 512."""
    cases = []
    for rows in (1, 512):
        x_TH, residual_TH, weight_H = torch.randn(rows, 576), torch.randn(rows, 576), torch.randn(576)
        out_TH, gate_up_T2F, act_TF = torch.empty(rows, 576), torch.randn(rows, 3072), torch.empty(rows, 1536)

        def norm(x=x_TH, w=weight_H, r=residual_TH, out=out_TH) -> None:  # type: ignore[no-untyped-def]
            kernels.add_rms_norm(r, x, w, 1e-5, out)

        def torch_norm(x=x_TH, w=weight_H, r=residual_TH) -> None:  # type: ignore[no-untyped-def]
            F.rms_norm(r.add_(x), (576,), w, 1e-5)

        def silu(g=gate_up_T2F, out=act_TF) -> None:  # type: ignore[no-untyped-def]
            kernels.silu_mul(g, out)

        def torch_silu(g=gate_up_T2F) -> None:  # type: ignore[no-untyped-def]
            F.silu(g[:, :1536]).mul_(g[:, 1536:])

        cases.append(Case(f"add_rms_norm {rows} x 576", norm, torch_norm, rows * 576 * 16.0))
        cases.append(Case(f"silu_mul {rows} x 1536", silu, torch_silu, rows * 1536 * 12.0))
    return cases


def sampling_cases() -> list[Case]:
    """Scans over 8 rows of 49,152 logits; torch samples by an exponential race, as torch.multinomial does."""
    rows, vocab = 8, 49_152
    logits_SV = torch.randn(rows, vocab) * 3
    one_S, key_S, floor_S = torch.ones(rows), torch.arange(rows), torch.full((rows,), -torch.inf)
    size = rows * vocab * 4.0
    return [
        Case("argmax", lambda: kernels.argmax_rows(logits_SV), lambda: logits_SV.max(1), size),
        Case(
            "gumbel_argmax",
            lambda: kernels.gumbel_argmax(logits_SV, one_S, key_S, 0, floor_S),
            lambda: (logits_SV.softmax(1) / torch.empty_like(logits_SV).exponential_()).max(1),
            size,
        ),
        Case("logsumexp", lambda: kernels.logsumexp_rows(logits_SV), lambda: logits_SV.logsumexp(1), size),
        Case("top 64", lambda: kernels.top_candidates(logits_SV, 64), lambda: logits_SV.topk(64), size),
    ]


def seconds_of(work: Callable[[], object], clock: Callable[[], float], least: float) -> float:
    """Time of one call, over as many calls as take `least` seconds."""
    calls, spent = 0, 0.0
    began = clock()
    while spent < least:
        work()
        calls += 1
        spent = clock() - began
    return spent / calls


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Both sides in alternation."""
    case.native()
    case.torch()
    native, by_torch = [], []
    for k in range(rounds):
        for side, times in ((case.native, native), (case.torch, by_torch))[:: 1 if k % 2 else -1]:
            times.append(seconds_of(side, clock, 0.02))
    mid = median(native)
    return {
        "case": case.name,
        "native_us": mid * 1e6,
        "torch_us": median(by_torch) * 1e6,
        "speedup": median(t / n for n, t in zip(native, by_torch, strict=True)),
        "gflop_s": case.flops / mid / 1e9 if case.flops else None,
        "best_gflop_s": case.flops / min(native) / 1e9 if case.flops else None,
        "gb_s": case.bytes / mid / 1e9,
        "best_gb_s": case.bytes / min(native) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="", help="generic, avx2 or avx512 (default: the best there is)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels.set_threads(args.threads)
    if args.isa:
        kernels.set_isa(args.isa)
    clock = time.thread_time if args.threads == 1 else time.perf_counter

    def attentions() -> list[Callable[[], Case]]:
        return [
            lambda: attention("prefill 1024, 9:3 heads, D 64", [(0, 1024)], 9, 3, 64, True),
            lambda: attention("prefill 1024, 8:2 heads, D 128", [(0, 1024)], 8, 2, 128, True),
            lambda: attention("chunk of 256 after 1792, 9:3, D 64", [(1792, 256)], 9, 3, 64, True),
            lambda: attention("decode 64 x 250, 9:3, D 64", [(249, 1)] * 64, 9, 3, 64, True),
            lambda: attention("decode 16 x 8192, 9:3, D 64", [(8191, 1)] * 16, 9, 3, 64, True),
            lambda: attention("the same, small pages", [(8191, 1)] * 16, 9, 3, 64, False),
            lambda: attention("decode 8 x 8192, 8:8, D 64", [(8191, 1)] * 8, 8, 8, 64, True),
            lambda: attention("decode 4 x 8192, 32:8, D 128", [(8191, 1)] * 4, 32, 8, 128, True),
        ]

    # One attention case in memory at a time: a few hundred megabytes each.
    figures = [measure(make(), args.rounds, clock) for make in attentions()]
    figures += [measure(case, args.rounds, clock) for case in row_cases() + sampling_cases()]
    big = torch.randn(50_000_000)
    read = [big.nbytes / seconds_of(big.sum, clock, 0.02) / 1e9 for _ in range(args.rounds)]
    print(
        f"isa {kernels.isa()}, {args.threads} thread(s); reading memory in order (torch.sum): {median(read):.1f} GB/s\n"
    )
    headers = ("case", "native us", "torch us", "torch/native", "GFLOP/s", "best", "GB/s", "best")
    keys = ("case", "native_us", "torch_us", "speedup", "gflop_s", "best_gflop_s", "gb_s", "best_gb_s")
    print(markdown(headers, [[f[k] for k in keys] for f in figures]))
    save("kernels", {"isa": kernels.isa(), "threads": args.threads, "read_gb_s": median(read), "cases": figures})


if __name__ == "__main__":
    main()
