"""From what a batch returned to what requests are told."""

from typing import TYPE_CHECKING

from evener.engine.batch import BatchResult
from evener.engine.events import Answer
from evener.engine.in_flight import InFlight
from evener.engine.sequence import Sequence, State

if TYPE_CHECKING:
    from evener.engine.replica import ReplicaEngine


def answers_of(replica: "ReplicaEngine", record: InFlight, result: BatchResult) -> list[Answer]:
    """New tokens and ends of the rows of a batch. Rows that end are ended in the replica."""
    if result.prompt_logprobs:
        for slot, entries in result.prompt_logprobs.items():
            if replica.active[slot].first_answer:
                replica.active[slot].prompt_logprobs.extend(entries)
    if result.tokens is None:
        return _lengths_only(replica, record, result)
    answers = []
    for i, seq in enumerate(record.rows):
        if seq.state is not State.DONE:
            answers.append(_with_token(replica, seq, i, result.tokens[i], result))
    return answers


def _with_token(replica: "ReplicaEngine", seq: Sequence, row: int, token: int, result: BatchResult) -> Answer:
    request = seq.request
    emitted: list[int] = []
    finish: str | None = None
    if request.max_tokens == 0:
        finish = "length"
    elif token in request.stop_token_ids:
        finish = "stop"
    else:
        emitted = [token]
        assert seq.tokens is not None
        seq.tokens.append(token)
        known = len(seq.tokens)
        if (known - 1) % replica.config.block_tokens == 0 and seq.state is State.DECODE:
            replica.publish(seq, known - 1)
        if known - request.prompt_len >= request.max_tokens:
            finish = "length"
    logprobs = result.logprobs.get(row)
    answer = Answer(
        request_id=request.request_id,
        tokens=emitted,
        count=len(emitted),
        finish=finish,
        stop_token=token if finish == "stop" else None,
        logprobs=[logprobs] if logprobs is not None and emitted else None,
        prompt_logprobs=seq.prompt_logprobs if seq.first_answer and seq.prompt_logprobs else None,
        cached_tokens=seq.cached if seq.first_answer else 0,
    )
    seq.first_answer = False
    seq.emitted += len(emitted)
    replica.output_tokens += len(emitted)
    if finish is not None:
        replica.end(seq)
    return answer


def _lengths_only(replica: "ReplicaEngine", record: InFlight, result: BatchResult) -> list[Answer]:
    """Where tokens are not known, as in a simulation: whoever ended, and first tokens."""
    answers: list[Answer] = []
    for slot, count in result.ended:
        seq = replica.active[slot]
        if seq.state is not State.DONE:
            answers.append(_counted(replica, seq, count, "stop"))
    for seq in record.capped:
        if seq.state is not State.DONE:
            answers.append(_counted(replica, seq, seq.request.max_tokens, "length"))
    if not record.shape.chunks:
        return answers
    for seq in record.rows[record.shape.decode_rows :]:
        if seq.first_answer and seq.state is not State.DONE:
            answers.append(_counted(replica, seq, 1, None))
    return answers


def _counted(replica: "ReplicaEngine", seq: Sequence, total: int, finish: str | None) -> Answer:
    count = total - seq.emitted
    answer = Answer(
        request_id=seq.request.request_id,
        tokens=[],
        count=count,
        finish=finish,
        cached_tokens=seq.cached if seq.first_answer else 0,
    )
    seq.first_answer = False
    seq.emitted = total
    replica.output_tokens += count
    if finish is not None:
        replica.end(seq)
    return answer
