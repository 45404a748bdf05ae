"""Divide whole nanoseconds in proportion, exactly. Pure."""

from collections.abc import Sequence


def divide(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to non-negative integer `weights`; the parts sum to `total`.

    Every part is within one of its share or next to it, and never falls when `total` grows (the highest averages of
    Sainte-Laguë, ties to the first). So a stretch that is cut anywhere gives parts that are not negative and add up.
    A `total` of 0 needs no weights; otherwise one weight must be positive.
    """
    whole = sum(weights)
    if total == 0:
        return [0] * len(weights)
    if len(weights) == 2 and whole:
        first = (2 * total * weights[0] + whole) // (2 * whole)
        return [first, total - first]
    assert total > 0 and whole > 0, f"cannot divide {total} by the weights {list(weights)}"
    parts = [(2 * total * w + whole) // (2 * whole) for w in weights]
    over = sum(parts) - total
    while over < 0:  # the next unit goes to the highest weight / (2 * part + 1)
        best = 0
        for k in range(1, len(weights)):
            if weights[k] * (2 * parts[best] + 1) > weights[best] * (2 * parts[k] + 1):
                best = k
        parts[best] += 1
        over += 1
    while over > 0:  # the unit that was given last: the lowest weight / (2 * part - 1), of equals the last
        worst = -1
        for k in range(len(weights)):
            if parts[k] and (
                worst < 0 or weights[k] * (2 * parts[worst] - 1) <= weights[worst] * (2 * parts[k] - 1)
            ):  # fmt: skip
                worst = k
        parts[worst] -= 1
        over -= 1
    return parts
