"""One language model, served live over several, possibly unlike, devices.

Reading guide, in layer order (imports point downwards only):

    spec      WHAT EXISTS     models, devices, plans, memory: frozen data
    cost      HOW LONG        the cost-model contract; roofline, fitted, measured tables
    ledger    WHERE TIME WENT the closed list of causes, spans to accounts, the verdict
    engine    WHAT NEXT       requests, batches, KV blocks, scheduling policies, one replica's scheduler
    router    WHICH REPLICA   the choice, and how long answers may become
    brain     all of these    one pure state machine: step(event, now) -> commands
    execute   WHO DOES IT     two bodies of the brain: sim (virtual clock), live (worker processes, transports)
    kernels   model           the native CPU kernels, and the maths that uses them
    profile   plan            measured devices; default plans, the search and its reasons
    api       llm             from options to a running engine; offline generation
    simulate  planning        `evener.simulate.simulate`, `evener.planning.make_plan`: the same as their commands
    workload  serve   cli     load client, comparison and replay, OpenAI-compatible HTTP, commands
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evener.errors import EvenerError
    from evener.llm import LLM, SamplingParams

__all__ = ["LLM", "EvenerError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import evener` stays light, and pulls in no torch.
    if name in ("LLM", "SamplingParams"):
        from evener import llm

        return getattr(llm, name)
    if name == "EvenerError":
        from evener.errors import EvenerError

        return EvenerError
    raise AttributeError(f"module 'evener' has no attribute {name!r}")
