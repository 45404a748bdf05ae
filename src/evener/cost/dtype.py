"""Which dtype of weights is fastest, as measured. Pure."""

from collections.abc import Sequence

from evener.cost.rates import Profile
from evener.errors import InvalidInput
from evener.spec.traffic import TrafficMix

PROMPT_ROWS = 256
"""Rows of prompts that typically share a reading of the weights."""


def fastest_dtype(profile: Profile, dtypes: Sequence[str], mix: TrafficMix) -> str:
    """The dtype whose matrix products take the devices together the least time for this traffic; the first of equals.

    A dtype that some device has no rate for is passed over. Raises InvalidInput when nothing was measured: an
    assumption would be presented as knowledge.
    """
    if profile.source == "default":
        raise InvalidInput(
            "dtype auto takes what is fastest as measured, and these devices were not measured; run `evener devices`, "
            f"or name one of {', '.join(dtypes)}"
        )

    def seconds(dtype: str) -> float:
        total = 0.0
        prompt = mix.input_tokens * (1.0 - mix.cached)
        for device in profile.devices:
            for rows, tokens in ((PROMPT_ROWS, prompt), (mix.decode_rows, mix.output_tokens)):
                total += float(device.together.gemm_ns(dtype, rows)) * device.stretch(False) * tokens / rows
        return total

    known = [t for t in dtypes if all(any(g.dtype == t for g in d.together.gemm) for d in profile.devices)]
    if not known:
        raise InvalidInput(f"none of {', '.join(dtypes)} was measured on all devices; run `evener devices`")
    return min(known, key=seconds)
