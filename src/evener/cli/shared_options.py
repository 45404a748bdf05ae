"""Options that `evener plan` and `evener simulate` share: what would be served, on which devices, in which formats."""

from collections.abc import Sequence
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        help="Directory, .gguf file, hub id or config.json. Default: the installed SmolLM2.", show_default=False
    ),
]
ClusterFile = Annotated[str | None, typer.Option("--cluster", help="Devices and links (YAML, docs/clusters.md).")]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--devices", "--device", help="As for serve; they need not be here. Repeatable, or separated by spaces.",
        show_default="all of this host",
    ),
]  # fmt: skip
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Of the weights.", show_default="fp32 on CPUs, bf16 or fp16 on GPUs")
]
KvDtype = Annotated[str | None, typer.Option("--kv-dtype", help="Of the KV cache.", show_default="as --dtype")]
KvCacheMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-memory",
        help="Room for KV of each device of this host, and of any that declares no memory.",
        show_default="a share of what is free",
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs", min=1, help="Sequences at once, per replica.", show_default="64 on CPUs, 256 on GPUs"
    ),
]
Costs = Annotated[
    str,
    typer.Option(
        "--costs", help="rates (measured here, published or assumed) or tables (measured operators of GPUs; the extra "
        "`tables`).",
    ),
]  # fmt: skip
Policy = Annotated[str, typer.Option("--policy", help="equal-time, fcfs or static.")]


def device_names(given: Sequence[str] | None) -> tuple[str, ...]:
    """The devices of a repeated option whose values may name several, separated by spaces."""
    return tuple(name for text in given or () for name in text.split())
