"""Launch commands for the replicas of a plan that vLLM or SGLang can run; what they cannot run is said.

Both split heads, columns and vocabulary equally, and use one tensor-parallel size for all stages. Unequal layers per
stage they take from an environment variable: `VLLM_PP_LAYER_PARTITION` (vllm, `distributed/utils.py`) and
`SGLANG_PP_LAYER_PARTITION` (sglang, the same place).
"""

from typing import Literal

from msgspec import Struct

from evener.plan.problem import Problem
from evener.plan.trial import Tried
from evener.spec.plan import Replica, size

Engine = Literal["vllm", "sglang"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang")
_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_KV: dict[str, dict[Engine, str]] = {"fp8": {"vllm": "fp8", "sglang": "fp8_e4m3"}}
"""KV dtypes that are not the weights' own, as the engines name them."""


class Launch(Struct, frozen=True):
    """One replica: its command, or why there is none; and what the command loses."""

    replica: int
    command: str | None
    notes: tuple[str, ...]


def emit(engine: Engine, problem: Problem, tried: Tried, model: str, first_port: int = 8000) -> list[Launch]:
    """A command per replica, on consecutive ports."""
    return [
        _launch(engine, problem, tried, r, replica, model, first_port + r)
        for r, replica in enumerate(tried.plan.replicas)
    ]


def _launch(engine: Engine, problem: Problem, tried: Tried, r: int, replica: Replica, model: str, port: int) -> Launch:
    notes: list[str] = []
    devices = [problem.cluster.device(name) for name in replica.devices()]
    sizes = {len(stage.shards) for stage in replica.stages}
    reasons = []
    if any(d.kind != "cuda" for d in devices):
        reasons.append("it uses CPU devices; these commands are for GPUs")
    if len(sizes) > 1:
        reasons.append(f"its stages have {', '.join(map(str, sorted(sizes)))} shards; {engine} has one size for all")
    tp, pp = max(sizes), len(replica.stages)
    spec = problem.model
    if spec.heads % tp:
        reasons.append(f"{spec.heads} query heads do not divide by {tp}")
    if spec.kv_heads % tp and tp % spec.kv_heads:
        reasons.append(f"{spec.kv_heads} KV heads and {tp} ranks do not divide one by the other")
    if spec.ffn % tp:
        reasons.append(f"{spec.ffn} FFN columns do not divide by {tp}")
    if problem.memory.dtype not in _DTYPE:
        reasons.append(f"dtype {problem.memory.dtype} needs a checkpoint quantised for {engine}")
    if reasons:
        return Launch(r, None, tuple(reasons))
    for s, stage in enumerate(replica.stages):
        for what, parts in (("heads", [sh.heads for sh in stage.shards]), ("columns", [sh.ffn for sh in stage.shards])):
            held = [size(p) for p in parts]
            if max(held) - min(held) > 1:
                notes.append(f"stage {s}: {engine} splits {what} equally, not {':'.join(map(str, held))}")
    layers = [size(stage.layers) for stage in replica.stages]
    hosts = list(dict.fromkeys(d.host for d in devices))
    env = []
    if len(hosts) == 1:
        env.append("CUDA_VISIBLE_DEVICES=" + ",".join(str(d.index) for d in devices))
    if pp > 1:  # where a remainder goes by itself differs from engine to engine
        env.append(f"{engine.upper()}_PP_LAYER_PARTITION=" + ",".join(map(str, layers)))
    kv = _KV.get(problem.memory.kv_dtype)
    if kv is None and problem.memory.kv_dtype != problem.memory.dtype:
        notes.append(
            f"{engine} keeps KV in {problem.memory.dtype}, not {problem.memory.kv_dtype}: other room for tokens"
        )
    rows, chunk = problem.max_num_seqs, tried.max_num_batched_tokens
    dtype = _DTYPE[problem.memory.dtype]
    if engine == "vllm":
        args = [
            f"vllm serve {model}", f"--tensor-parallel-size {tp}", f"--pipeline-parallel-size {pp}",
            f"--max-num-seqs {rows}", f"--max-num-batched-tokens {max(chunk, rows)}", f"--dtype {dtype}",
            f"--port {port}",
        ]  # fmt: skip
        if len(hosts) > 1:
            args.append("--distributed-executor-backend ray")
            notes.append(f"start a Ray cluster over {', '.join(hosts)} first; ranks follow Ray's placement of the GPUs")
    else:
        args = [
            f"python -m sglang.launch_server --model-path {model}", f"--tp-size {tp}", f"--pp-size {pp}",
            f"--max-running-requests {rows}", f"--chunked-prefill-size {chunk}", f"--dtype {dtype}", f"--port {port}",
        ]  # fmt: skip
        if len(hosts) > 1:
            args.append(f"--nnodes {len(hosts)} --dist-init-addr {hosts[0]}:20000 --node-rank RANK")
            notes.append(f"run it on each of {', '.join(hosts)}, with RANK 0 to {len(hosts) - 1} in this order")
    if kv is not None:
        args.append(f"--kv-cache-dtype {kv[engine]}")
    if len(hosts) > 1:
        per_host = {h: sum(d.host == h for d in devices) for h in hosts}
        if len(set(per_host.values())) > 1:
            return Launch(r, None, (f"its hosts give unequal numbers of GPUs ({per_host}); {engine} wants equal ones",))
    kinds = {d.peaks.source if d.peaks is not None else d.name for d in devices}
    if tp > 1 and len(kinds) > 1:
        notes.append("unlike GPUs in one tensor-parallel group: the slowest will rule")
    return Launch(r, " ".join([*env, " \\\n  ".join(args)]), tuple(notes))
