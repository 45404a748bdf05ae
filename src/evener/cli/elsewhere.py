"""Cases of a comparison on devices that are not here: simulated as `evener simulate` does, from a cluster file."""

from collections.abc import Sequence

from evener.api import EngineOptions, describe
from evener.errors import InvalidInput
from evener.ledger.verdict import verdict
from evener.simulate import SimulateOptions, simulate
from evener.workload.compare import Case, Compared, Progress

_SHARED = [
    name
    for name in EngineOptions.__struct_fields__
    if name in SimulateOptions.__struct_fields__ and name not in ("ledger", "max_queue")
]
"""Options that mean the same in both."""


def compare_elsewhere(
    cases: Sequence[Case], cluster: str, traffic: str, slo: str | None, progress: Progress
) -> list[Compared]:
    """Simulate every case. Raises InvalidInput naming the case, also for an option that means nothing there."""
    made = [(case, _options(case, cluster, traffic, slo)) for case in cases]
    out = []
    for case, options in made:
        progress(f"{case.name} (simulated)")
        try:
            got = simulate(options)
        except InvalidInput as error:
            raise InvalidInput(f"case {case.name!r}: {error.message}") from error
        assert got.account is not None
        out.append(
            Compared(
                name=case.name,
                live=False,
                plan=got.plan.name,
                layout=tuple(describe(got.plan)),
                policy=options.policy,
                router=options.router,
                report=got.report,
                account=got.account,
                verdict=verdict(got.account, got.hints),
                output_tok_s=(got.report.output_tok_s,),
            )
        )
    return out


def _options(case: Case, cluster: str, traffic: str, slo: str | None) -> SimulateOptions:
    for name in sorted(case.said):
        if name not in _SHARED:
            raise InvalidInput(f"case {case.name!r}: {name} means nothing with --cluster; leave it out")
    # What was not said, the simulation finds out by the devices: dtypes, sequences at once ...
    taken = {name: getattr(case.options, name) for name in _SHARED if name in case.said}
    return SimulateOptions(cluster=cluster, traffic=traffic, slo=slo, **taken)
