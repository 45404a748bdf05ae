"""Request fields by name: which are known and refused, and how a body becomes a typed record.

A field is either implemented (it is in the record of its wire format), or refused by name. A known but refused
field may carry its neutral value, which asks for nothing: clients send `best_of: 1` or `tools: []` by habit.
"""

import difflib
import json
import re
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.exceptions import HTTPException

from evener.errors import BodyTooLarge, InvalidRequest, UnsupportedParameter
from evener.units import human_bytes

T = TypeVar("T")

REFUSED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "media_io_kwargs": (),
    "min_tokens": (0,),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Known to OpenAI or vLLM and not implemented here -> the neutral values that pass."""


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object, read no further than `limit` bytes.

    Raises BodyTooLarge (413), HTTPException 415, or InvalidRequest (400).
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        shown = repr(content_type[:80]) if media_type != "application/json" else "a compressed body"
        raise HTTPException(415, f"the body is {shown}; send plain JSON with 'Content-Type: application/json'")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_large(len(body), limit)
    try:
        raw = msgspec.json.decode(bytes(body))
    except RecursionError:
        raise InvalidRequest("the JSON body is nested too deeply; flatten it") from None
    except ValueError as error:  # malformed JSON, invalid UTF-8, lone surrogates, numbers out of range
        raise InvalidRequest(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidRequest(f'the body is a JSON {_kind(raw)}; send an object like {{"model": ...}}')
    return raw


def to_record(raw: dict[str, Any], record: type[T]) -> T:
    """Check the names, then the types and ranges, of a request body.

    Nulls count as absent, as with OpenAI. Raises UnsupportedParameter or InvalidRequest naming the field.
    """
    raw = {name: value for name, value in raw.items() if value is not None}
    known = {f.encode_name for f in msgspec.structs.fields(record)}  # type: ignore[arg-type]
    for name in [n for n in raw if n not in known]:
        refuse(name, raw.pop(name), known)
    try:
        return msgspec.convert(raw, record, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(error, raw) from None
    except RecursionError:
        raise InvalidRequest("the JSON body is nested too deeply; flatten it") from None


def refuse(name: str, value: Any, known: set[str], where: str = "") -> None:
    """Refuse a field that is not implemented, unless it asks for nothing. `where` is a prefix like `messages[0].`."""
    if name in REFUSED:
        # Equal values of another type (True == 1) are not neutral.
        if any(value == neutral and type(value) is type(neutral) for neutral in REFUSED[name]):
            return
        raise UnsupportedParameter(f"{where}{name} is not supported by this server; leave it out", f"{where}{name}")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
    raise InvalidRequest(f"unknown field {where + name[:80]!r}{hint}", where + name[:80])


def shown(value: Any) -> str:
    """A value in a message, as JSON, cut to a readable length."""
    if isinstance(value, list | dict) and len(value) > 20:
        return f"({'array' if isinstance(value, list) else 'object'} of {len(value)})"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "(deeply nested)"
    return text if len(text) <= 60 else text[:57] + "..."


_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)


def _explain(error: msgspec.ValidationError, raw: Any) -> InvalidRequest:
    """`Expected `int` >= 1 - at `$.n`` -> `n=0: expected int >= 1`."""
    match = _PATH.match(str(error))
    assert match is not None
    what, path = match["what"].replace("`", ""), (match["path"] or "").lstrip(".").replace("[...]", "")
    if missing := re.search(r"missing required field (\S+)", what):
        param = f"{path}.{missing[1]}".lstrip(".")
        return InvalidRequest(f"{param} is missing; it is required", param)
    what = what[:1].lower() + what[1:]
    if not path:
        return InvalidRequest(what)
    return InvalidRequest(f"{path}={shown(_at(raw, path))}: {what}", path)


def _at(raw: Any, path: str) -> Any:
    """The value at msgspec's path `messages[0].content`."""
    for name, index in re.findall(r"\.?(\w+)|\[(\d+)\]", path):
        if isinstance(raw, dict) and name in raw:
            raw = raw[name]
        elif isinstance(raw, list) and index:
            raw = raw[int(index)]
    return raw


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {human_bytes(size)} or more, the limit is {human_bytes(limit)}; send less")
