"""What one replica looks like to the router, for one request."""

from evener.engine.replica import ReplicaEngine
from evener.engine.sequence import Sequence, State
from evener.router.choose import ReplicaLoad
from evener.router.lengths import LengthEstimator


def load_of(replica: ReplicaEngine, seq: Sequence, lengths: LengthEstimator) -> ReplicaLoad:
    """Work left at `replica`, and what `seq` would find cached there. O(running rows)."""
    config = replica.config
    pairs = replica.waiting.pairs
    context = replica.waiting.tokens
    decode = 0.0
    waiting = replica.waiting_rows()
    if waiting:
        decode = waiting * lengths.expected_remaining(0, max(1, replica.waiting.caps // waiting))
    prefill = replica.waiting.tokens
    running = 0
    for row in replica.active.values():
        if row.state not in (State.PREFILL, State.DECODE):
            continue
        running += 1
        left = row.left
        prefill += left
        pairs += left * row.computed + left * (left + 1) // 2
        length = row.current_length()
        context += length
        cap = row.request.max_tokens
        decode += lengths.expected_remaining(min(cap, max(0, length - row.request.prompt_len)), cap)
    size = config.block_tokens
    hits = replica.pool.find(seq.whole_keys(size, seq.target - 1))
    return ReplicaLoad(
        replica=replica.index,
        waiting_rows=waiting,
        running_rows=running,
        prefill_tokens_left=prefill,
        prefill_pairs_left=pairs,
        decode_tokens_left=decode,
        context_tokens=context,
        max_rows=config.max_num_seqs,
        kv_blocks=config.kv_blocks,
        kv_blocks_free=replica.pool.available,
        block_tokens=size,
        cached_prefix_tokens=len(hits) * size,
    )
