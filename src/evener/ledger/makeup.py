"""Divide a batch's compute time among what the batch consists of.

Prompt tokens and decoding rows share a batch in proportion to what the cost model says each would take alone. Rows of
one kind cost the same, so a recomputed token has its share of the prompt tokens, a late row of the decoding ones, and
a padded row of all: reading the weights is not charged twice.
"""

from evener.cost.base import BatchShape, CostModel
from evener.ledger.causes import Cause
from evener.ledger.spans import MakeUp

_SCALE = 1 << 20
"""Weights are integers; what is lost by rounding them is below a millionth."""


def pure_cause(made_of: MakeUp, late_rows: int) -> Cause | None:
    """The one cause of a batch of one kind; None for a mixed one, which `weights` divides."""
    shape = made_of.shape
    if late_rows or made_of.recompute_tokens or shape.pad_tokens:
        return None
    if not shape.prefill_tokens:
        return Cause.DECODE
    return None if shape.decode_rows else Cause.PREFILL


def weights(
    costs: CostModel, replica: int, stage: int, made_of: MakeUp, late_rows: int, repeat: int
) -> list[tuple[Cause, int]]:
    """Causes of a batch's compute time on one stage with their weights; at least one is positive.

    `late_rows` are counted over all `repeat` steps.
    """
    shape = made_of.shape
    prompt, rows, pad = shape.prefill_tokens, shape.decode_rows, shape.pad_tokens
    tokens = prompt + rows + pad
    assert tokens > 0, "an empty batch took compute time"
    if prompt and rows:
        alone = BatchShape(
            prompt, shape.prefill_pairs, sampled_rows=shape.sampled_rows - rows, chunks=shape.chunks
        )  # fmt: skip
        decoding = BatchShape(decode_rows=rows, decode_context=shape.decode_context, sampled_rows=rows)
        for_prompt: int = costs.stage_ns(replica, stage, alone)
        for_rows: int = costs.stage_ns(replica, stage, decoding)
        if for_prompt + for_rows == 0:  # a model that calls both free divides by tokens
            for_prompt, for_rows = prompt, rows
    else:
        for_prompt, for_rows = (1, 0) if prompt else (0, 1)
    # Of (for_prompt + for_rows), padding takes pad / tokens; the scale keeps the fractions.
    both = for_prompt + for_rows
    out = [(Cause.PADDING, _SCALE * both * pad // tokens)] if pad else []
    real = _SCALE * (prompt + rows)
    if prompt:
        weight = real * for_prompt // tokens
        again = weight * made_of.recompute_tokens // prompt
        out += [(Cause.PREFILL, weight - again), (Cause.RECOMPUTE, again)]
    if rows:
        weight = real * for_rows // tokens
        late = weight * late_rows // (rows * repeat)
        out += [(Cause.DECODE, weight - late), (Cause.SPECULATION, late)]
    return out
