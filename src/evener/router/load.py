"""What one replica looks like to the router, for one request."""

from evener.engine.replica import ReplicaEngine
from evener.engine.sequence import Sequence
from evener.router.choose import ReplicaLoad
from evener.router.lengths import LengthEstimator


def rows_of(replica: ReplicaEngine) -> ReplicaLoad:
    """How many requests are there: all that a rule needs which does not predict."""
    return ReplicaLoad(
        replica.index, True, replica.waiting_rows(), replica.running_rows(), max_rows=replica.config.max_num_seqs
    )


def decode_left_at(replica: ReplicaEngine, lengths: LengthEstimator) -> float:
    """Expected output tokens of all that has not ended there. O(running rows)."""
    queue, expected = replica.waiting, lengths.expected_remaining
    decode = 0.0
    if queue.rows:
        decode = queue.rows * expected(0, max(1, queue.caps // queue.rows))
    for row in replica.prefilling():
        cap = row.request.max_tokens
        decode += expected(min(cap, max(0, row.length - row.request.prompt_len)), cap)
    # Rows whose last token is in flight hold a slot, and ask for nothing more.
    for group in replica.groups:
        decode = lengths.expected_sum(decode, group.steps, group.leads())
        for row in group.pending:
            cap = row.request.max_tokens
            decode += expected(min(cap, row.length - row.request.prompt_len), cap)
    return decode


def load_of(replica: ReplicaEngine, seq: Sequence) -> ReplicaLoad:
    """Work at `replica` but for the output that is left, and what `seq` would find cached there."""
    config = replica.config
    queue = replica.waiting
    pairs, context, prefill = queue.pairs, queue.tokens, queue.tokens
    for row in replica.prefilling():
        left = row.left
        prefill += left
        pairs += left * row.computed + left * (left + 1) // 2
        context += row.length
    for group in replica.groups:
        context += group.context
        for row in group.pending:
            context += row.length
    size = config.block_tokens
    hits: list[int] = []
    if seq.request.sampling.prompt_logprobs is None:  # else every position is computed
        hits = replica.pool.find(seq.whole_keys(size, seq.target - 1))
    return ReplicaLoad(
        replica=replica.index,
        waiting_rows=queue.rows,
        running_rows=replica.running_rows(),
        prefill_tokens_left=prefill,
        prefill_pairs_left=pairs,
        context_tokens=context,
        max_rows=config.max_num_seqs,
        kv_blocks=config.kv_blocks,
        kv_blocks_free=replica.pool.available,
        block_tokens=size,
        cached_prefix_tokens=len(hits) * size,
    )
