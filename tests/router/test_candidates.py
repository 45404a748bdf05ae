"""Of very many replicas, the router looks at the least loaded living ones."""

from tests.laws.traffic import SimpleCosts

from evener.engine.policy import make_policy
from evener.engine.replica import ReplicaConfig, ReplicaEngine
from evener.engine.request import Request
from evener.engine.sequence import Sequence
from evener.router.candidates import CLOSELY, Candidates
from evener.units import Nanoseconds

REPLICAS = 2 * CLOSELY


def test_lost_replicas_never_come_back() -> None:
    """However often the heap is made anew, those that are lost take no place among the candidates."""
    costs = SimpleCosts(1)
    replicas = [ReplicaEngine(r, ReplicaConfig(64), make_policy("fcfs"), costs) for r in range(REPLICAS)]
    candidates = Candidates(replicas, costs)
    for lost in range(CLOSELY):
        candidates.lost(lost)
    for k in range(20 * REPLICAS):  # each changes a key
        replica = replicas[CLOSELY + k % (REPLICAS - CLOSELY)]
        replica.add(Sequence(Request(f"r{k}", 10, 10), k, Nanoseconds(0)))
        candidates.note(replica)
    assert {r.index for r in candidates.best(None)} == set(range(CLOSELY, REPLICAS))
