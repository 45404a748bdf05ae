"""What a client asks for, as the brain sees it. No true output length is visible here, only the cap."""

from msgspec import Struct


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How to choose tokens. Meanings and ranges as in vLLM; the counter is (seed, choice, position)."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Applied to tokens of the prompt and of the output."""
    presence_penalty: float = 0.0
    """Applied once to tokens of the output."""
    frequency_penalty: float = 0.0
    """Applied per occurrence to tokens of the output."""
    seed: int = 0
    """Drawn at admission when the client gives none, and kept. 0 <= seed < 2**64."""
    choice: int = 0
    """Index among the n choices of one request."""
    logprobs: int | None = None
    """Number of top alternatives to return per output token; 0: only the chosen one; None: none."""
    prompt_logprobs: int | None = None
    """The same for prompt tokens. Such a request takes no prefix hit, as every position needs its logits."""

    @property
    def greedy(self) -> bool:
        """True when the choice is the argmax."""
        return self.temperature == 0.0


class Request(Struct, frozen=True, omit_defaults=True):
    """One sequence to generate. A client request with n choices becomes n of these."""

    request_id: str
    prompt_len: int
    max_tokens: int
    """Cap on output tokens, already clipped to the context."""
    prompt: list[int] | None = None
    """Token ids; None in simulations that know lengths only."""
    block_keys: list[int] | None = None
    """Identities of whole prompt blocks, for prefix reuse in simulations without token ids."""
    stop_token_ids: tuple[int, ...] = ()
    """End-of-sequence ids (empty under ignore_eos)."""
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    """Lower runs earlier; ties go to the earlier arrival."""
