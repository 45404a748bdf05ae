"""Vidur's simulator on a CSV of requests; `sim_speed.py --vidur FOLDER` runs this in Vidur's own environment.

    FOLDER/.venv/bin/python benchmarks/beside/vidur_on_trace.py REQUESTS.csv --replicas 8

FOLDER: a checkout of github.com/microsoft/vidur, with what its requirements.txt names in FOLDER/.venv (wandb may be
missing). Llama-2-70B on two A100 per replica, Sarathi with 512 tokens and 128 sequences, no metrics. What its predictor
would look up in trained tables it looks up here in tables of the same keys, filled from published peaks: training takes
half an hour, and what a table says does not change how fast it is read. Prints one JSON object: seconds of processor
time of the run alone, reading the requests and filling the tables not counted, and batches.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import types
from itertools import product
from pathlib import Path
from typing import Any

MOST_TOKENS, MOST_BATCH, CHUNK, GRAIN = 4096, 128, 512, 64
FLOP_PER_MS, BYTES_PER_MS, LINK_PER_MS = 312e9, 2.04e9, 300e6
HIDDEN, HEADS, KV_HEADS, DIM, FFN, TP = 8192, 64, 8, 128, 28_672, 2


def gemm(rows: int, inputs: int, outputs: int) -> float:
    """Milliseconds of one product of fp16."""
    return max(2 * rows * inputs * outputs / FLOP_PER_MS, 2 * inputs * outputs / BYTES_PER_MS)


def tables() -> dict[str, dict[tuple[int, ...], float]]:
    """Milliseconds of every operator of one layer, by the keys of Vidur's predictor."""
    rows = range(1, MOST_TOKENS + 1)
    contexts = range(0, MOST_TOKENS + 1, GRAIN)
    moved = {(n,): 4 * n * HIDDEN / BYTES_PER_MS for n in rows}
    attention = 4 * HEADS * DIM / TP
    return {
        "attn_pre_proj": {(n,): gemm(n, HIDDEN, (HEADS + 2 * KV_HEADS) * DIM // TP) for n in rows},
        "attn_post_proj": {(n,): gemm(n, HEADS * DIM // TP, HIDDEN) for n in rows},
        "mlp_up_proj": {(n,): gemm(n, HIDDEN, 2 * FFN // TP) for n in rows},
        "mlp_down_proj": {(n,): gemm(n, FFN // TP, HIDDEN) for n in rows},
        **dict.fromkeys(
            ("mlp_act", "attn_rope", "attn_kv_cache_save", "input_layernorm", "post_attention_layernorm", "add"), moved
        ),
        "all_reduce": {(n,): 2 * n * HIDDEN / LINK_PER_MS for n in rows},
        "attn_prefill": {
            (kv, n * n): attention * n * (kv + n / 2) / FLOP_PER_MS for kv, n in product(contexts, rows)
        },
        "attn_decode": {
            (batch, kv): batch * kv * 4 * KV_HEADS * DIM / TP / BYTES_PER_MS
            for batch, kv in product(range(1, MOST_BATCH + 1), contexts)
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, help="CSV: arrived_at,num_prefill_tokens,num_decode_tokens")
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="Vidur's checkout (default: here)")
    args = parser.parse_args()
    sys.path.insert(0, str(args.folder))
    if importlib.util.find_spec("wandb") is None:
        sys.modules["wandb"] = types.SimpleNamespace(run=None)  # type: ignore[assignment]
    from vidur import config
    from vidur.execution_time_predictor.sklearn_execution_time_predictor import SklearnExecutionTimePredictor as Trained
    from vidur.simulator import Simulator

    filled = tables()
    Trained._train_models = lambda self: {}
    Trained._predict_from_models = lambda self: filled
    batches, asked = [0], Trained.get_execution_time

    def counted(self: Any, *given: Any) -> Any:
        batches[0] += 1
        return asked(self, *given)

    Trained.get_execution_time = counted
    with tempfile.TemporaryDirectory() as folder:
        simulation = config.SimulationConfig(
            log_level="error",
            cluster_config=config.ClusterConfig(
                num_replicas=args.replicas,
                replica_config=config.ReplicaConfig(
                    model_name="meta-llama/Llama-2-70b-hf",
                    tensor_parallel_size=TP,
                    device="a100",
                    network_device="a100_pairwise_nvlink",
                ),
                replica_scheduler_config=config.SarathiSchedulerConfig(batch_size_cap=MOST_BATCH, chunk_size=CHUNK),
            ),
            request_generator_config=config.TraceRequestGeneratorConfig(
                trace_file=str(args.requests), max_tokens=MOST_TOKENS
            ),
            metrics_config=config.MetricsConfig(
                write_metrics=False, enable_chrome_trace=False, store_plots=False, output_dir=folder, cache_dir=folder
            ),
        )
        simulator = Simulator(simulation)
        began = time.process_time()
        simulator.run()
        seconds = time.process_time() - began
    print(json.dumps({"seconds": seconds, "batches": batches[0], "virtual_s": simulator._time}))


if __name__ == "__main__":
    main()
