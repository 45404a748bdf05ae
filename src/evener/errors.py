"""Every error Evener raises on purpose, with its HTTP status and process exit code.

    EvenerError                     500  exit 1
    +- InvalidInput                 400  exit 2   something the caller can mend
    |  +- InvalidRequest            400           a field of a request (names the field)
    |  |  +- ContextTooLong         400           prompt + max_tokens exceed the model's context
    |  |  +- UnsupportedParameter   400           known to OpenAI or vLLM, not to Evener
    |  |  +- UnknownModel           404
    |  |  +- Unauthorized           401
    |  |  +- BodyTooLarge           413
    |  +- InvalidPlan               400  exit 2   hole, overlap, memory, unknown device
    |  +- InvalidDevice             400  exit 2   a device that cannot be parsed or is not here
    |  +- UnsupportedModel          400  exit 2   lists the supported ones
    |  +- InvalidTrace              400  exit 2   a traffic file or arrival process
    +- Overloaded                   429  exit 1   queue limit reached; carries retry_after_s
    +- Unavailable                  503  exit 3
       +- WorkerLost                503           a worker died or hung; names device and reason
       +- StartFailed               503  exit 3   the server could not come up

A message names the value, the limit and the remedy. `assert` is for our own mistakes only.
"""


class EvenerError(Exception):
    """Root of the tree. `status` is the HTTP status, `exit_code` the process exit code."""

    status: int = 500
    exit_code: int = 1
    code: str = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidInput(EvenerError):
    """The caller can mend this by changing what was passed in."""

    status = 400
    exit_code = 2
    code = "invalid_input"


class InvalidRequest(InvalidInput):
    """A request field has a wrong type or value. `param` names the field."""

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    """Prompt plus requested tokens exceed what the model or the KV cache can hold."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """A parameter Evener knows by name and does not implement: refused, never ignored."""

    code = "unsupported_parameter"


class UnknownModel(InvalidRequest):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"


class Unauthorized(InvalidRequest):
    """Missing or wrong API key."""

    status = 401
    code = "invalid_api_key"


class BodyTooLarge(InvalidRequest):
    """The request body exceeds the server's limit."""

    status = 413
    code = "body_too_large"


class InvalidPlan(InvalidInput):
    """A plan that cannot work, with the reason and the remedy."""

    code = "invalid_plan"


class InvalidDevice(InvalidInput):
    """A device that cannot be parsed, or that this host does not have."""

    code = "invalid_device"


class UnsupportedModel(InvalidInput):
    """A model whose architecture or weight format Evener does not implement."""

    code = "unsupported_model"


class InvalidTrace(InvalidInput):
    """A traffic file or an arrival process that cannot be used."""

    code = "invalid_trace"


class Overloaded(EvenerError):
    """The queue limit is reached; nothing was accepted. Try again after `retry_after_s`."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(EvenerError):
    """The service cannot answer now."""

    status = 503
    exit_code = 3
    code = "unavailable"


class WorkerLost(Unavailable):
    """A worker died, hung or was fenced. Every wait in a transport ends in data or in this."""

    code = "worker_lost"

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"worker {device} lost: {reason}")
        self.device = device
        self.reason = reason


class StartFailed(Unavailable):
    """The server could not come up; nothing was started, or everything was stopped again."""

    code = "start_failed"
