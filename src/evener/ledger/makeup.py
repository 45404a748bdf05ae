"""Divide a batch's compute time among what the batch consists of.

Prompt tokens and decoding rows share a batch in proportion to what the cost model says each would take alone. Rows of
one kind cost the same, so a recomputed token has its share of the prompt tokens, a late row of the decoding ones, and
a padded row of all: reading the weights is not charged twice.
"""

from evener.cost.base import BatchShape, CostModel
from evener.ledger.causes import Cause
from evener.ledger.spans import MakeUp

_PREFILL, _DECODE, _PADDING, _RECOMPUTE, _SPECULATION = (
    int(c) for c in (Cause.PREFILL, Cause.DECODE, Cause.PADDING, Cause.RECOMPUTE, Cause.SPECULATION)
)
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
) -> tuple[list[int], list[int]]:
    """Causes of a batch's compute time on one stage, and their positive weights.

    `late_rows` are counted over all `repeat` steps.
    """
    shape = made_of.shape
    prompt, rows, pad = shape.prefill_tokens, shape.decode_rows, shape.pad_tokens
    assert prompt + rows + pad > 0, "an empty batch took compute time"
    for_prompt, for_rows = prompt, rows
    if prompt and rows:
        alone = BatchShape(prompt, shape.prefill_pairs, 0, 0, shape.sampled_rows - rows, 0, shape.chunks)
        decoding = BatchShape(0, 0, rows, shape.decode_context, rows)
        both = costs.stage_ns(replica, stage, alone), costs.stage_ns(replica, stage, decoding)
        if any(both):  # a model that calls both free divides by tokens
            for_prompt, for_rows = both
        if not (pad or late_rows or made_of.recompute_tokens) and for_prompt and for_rows:
            return [_PREFILL, _DECODE], [for_prompt, for_rows]
    # Padding takes pad / tokens of the whole; the scale keeps the fractions.
    share = _SCALE * (prompt + rows)
    weight = {_PADDING: _SCALE * (for_prompt + for_rows or 1) * pad}
    if prompt:
        weight[_PREFILL] = share * for_prompt
        weight[_RECOMPUTE] = weight[_PREFILL] * made_of.recompute_tokens // prompt
        weight[_PREFILL] -= weight[_RECOMPUTE]
    if rows:
        weight[_DECODE] = share * for_rows
        weight[_SPECULATION] = weight[_DECODE] * late_rows // (rows * repeat)
        weight[_DECODE] -= weight[_SPECULATION]
    return [c for c, w in weight.items() if w], [w for w in weight.values() if w]
