"""The cost model of a plan over a cluster whose devices need not be here: one way to ask for any of them."""

from evener.cost.roofline import RooflineCostModel
from evener.cost.tables import MissingTerms, TablesCostModel
from evener.errors import InvalidInput
from evener.profile.aiconfigurator import tables_of
from evener.profile.cluster import profile_of
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan


def costs_of(
    model: ModelSpec, plan: Plan, cluster: Cluster, how: str = "peaks", *, dtype: str = "bf16", kv_dtype: str = "bf16",
    engine: str = "vllm", terms: MissingTerms | None = None,
) -> RooflineCostModel:  # fmt: skip
    """`peaks`: measurements of this host's devices, published peaks of the others. `tables`: operators of the engine's
    kernels as measured on such devices (the extra `tables`), with `terms` for what they lack.

    Raises InvalidInput for another `how`, and where a dtype, a device or the package is missing.
    """
    if how == "peaks":
        if terms is not None:
            raise InvalidInput("terms are for how='tables'; published peaks take their assumptions from the profile")
        return RooflineCostModel(model, plan, profile_of(cluster), dtype=dtype, kv_dtype=kv_dtype, links=cluster.links)
    if how != "tables":
        raise InvalidInput(f"cost model {how!r} is not one of peaks, tables")
    tables = {name: tables_of(cluster.device(name), engine) for name in plan.devices()}
    return TablesCostModel(model, plan, cluster, tables, dtype=dtype, kv_dtype=kv_dtype, terms=terms)
