"""Does speed grow as the operations do? Decode tokens per second by rows at once and by context.

    benchmarks/growth.py [--dtype int8] [--layout dp2] [--rows 1,4,16,64,256] [--contexts 128,1024,4096,8000]

Each case decodes at least `--steps` tokens for every row at about that context, and three times as many as the prompts
have chunks, so that most steps are after the last prompt; rows times context are capped by `--most-tokens`. `cost` is
device-milliseconds per token; `x model` is a step's time over what the cost model, made of measured rates, says it
takes.
"""

import argparse

from common import markdown, save
from evener.cost.base import BatchShape
from steady import engine, equal, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--layout", default="dp2")
    parser.add_argument("--rows", default="1,4,16,64,256")
    parser.add_argument("--contexts", default="128,1024,4096,8000")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--most-tokens", type=int, default=70_000)
    args = parser.parse_args()
    prepared = engine(args.layout, args.dtype, max_num_seqs=256)
    replicas, devices = len(prepared.plan.replicas), len(prepared.plan.devices())
    table = []
    for context in (int(x) for x in args.contexts.split(",")):
        for rows in (int(x) for x in args.rows.split(",")):
            if rows * context > args.most_tokens:
                continue
            chunks = -(-rows // replicas) * context // prepared.max_num_batched_tokens
            steps = max(args.steps, 3 * chunks)
            report = run(prepared, equal(rows, context, steps)).report
            # Once all prompts are in, the gaps are those of decode steps alone: the quickest rows know no other.
            step_ms = report.itl_ms.p50
            each = -(-rows // replicas)
            shape = BatchShape(decode_rows=each, decode_context=each * (context + steps // 2), sampled_rows=each)
            said_ms = float(prepared.costs.batch_ns(0, shape)) / 1e6
            busy = min(replicas, rows) * devices / replicas
            table.append([context, rows, 1e3 * rows / step_ms, step_ms, busy * step_ms / rows, step_ms / said_ms])
            print(table[-1], flush=True)
    print(markdown(["context", "rows", "decode tok/s", "step ms", "cost, device-ms/token", "x model"], table))
    save("growth", {"layout": args.layout, "dtype": args.dtype, "rows": table})


if __name__ == "__main__":
    main()
