"""The messages of a conversation: what they may hold, and how they become a prompt."""

import inspect
from functools import cache
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta, Struct

from evener.errors import InvalidRequest, UnsupportedParameter
from evener.serve.fields import refuse, shown
from evener.serve.front import Front

ROLES = ("system", "developer", "user", "assistant")


@cache
def _reserved() -> frozenset[str]:
    """Names that chat_template_kwargs may not set: they are arguments of the renderer, not of the template."""
    from transformers import PreTrainedTokenizerBase  # loaded with the tokenizer; slow to import before workers start

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


class TextPart(Struct, frozen=True, kw_only=True):
    """A part of a message; images, audio and files are refused by name."""

    type: str
    text: str = ""


class Message(Struct, frozen=True, kw_only=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)]


class Conversation(Protocol):
    """Fields that say how messages become a prompt; /tokenize has them too (msgspec records cannot mix in)."""

    messages: list[Message]
    add_generation_prompt: bool | None
    continue_final_message: bool
    add_special_tokens: bool
    chat_template_kwargs: dict[str, Any]


def check_messages(raw: dict[str, Any]) -> None:
    """Refuse by name what messages may hold elsewhere: tools, images, names. Drops fields that ask for nothing."""
    messages = raw.get("messages")
    if not isinstance(messages, list):
        return  # the typed record says what is wrong
    known = {"role", "content"}
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            return
        where, role = f"messages[{k}].", message.get("role")
        if role in ("tool", "function"):
            raise UnsupportedParameter(
                f"{where}role={shown(role)} is not supported by this server; roles are {', '.join(ROLES)}",
                f"{where}role",
            )
        if isinstance(role, str) and role not in ROLES:
            raise InvalidRequest(f"{where}role={shown(role)} is unknown; roles are {', '.join(ROLES)}", f"{where}role")
        for name in [n for n in message if n not in known]:
            value = message.pop(name)
            if value is None or value == []:
                continue  # as in a message of OpenAI's client sent back: refusal, tool_calls, annotations ...
            if name in _MESSAGE_REFUSED:
                raise UnsupportedParameter(f"{where}{name} is not supported by this server; leave it out", where + name)
            refuse(name, value, known, where)
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UnsupportedParameter(
                    f"{where}content[{j}].type={shown(kind)} is not supported by this server; use 'text'",
                    f"{where}content",
                )


_MESSAGE_REFUSED = {"name", "tool_calls", "tool_call_id", "function_call", "refusal", "reasoning", "reasoning_content",
                    "audio", "annotations"}  # fmt: skip


async def chat_prompt(front: Front, body: Conversation) -> list[int]:
    """Tokens of the rendered conversation. Raises InvalidRequest or ContextTooLong."""
    if body.add_generation_prompt and body.continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message exclude each other; set one", "continue_final_message"
        )
    if taken := sorted(_reserved() & body.chat_template_kwargs.keys()):
        raise InvalidRequest(
            f"chat_template_kwargs may not set {', '.join(taken)}; use the request field of that name, if there is one",
            "chat_template_kwargs",
        )
    opens = body.add_generation_prompt
    options = {
        "add_generation_prompt": not body.continue_final_message if opens is None else opens,
        "continue_final_message": body.continue_final_message,
        **body.chat_template_kwargs,
    }
    messages = [{"role": m.role, "content": _text(m)} for m in body.messages]
    return await front.encode(front.render_chat(messages, options), body.add_special_tokens, "messages")


def _text(message: Message) -> str:
    """Text parts are joined by newlines, as vLLM does."""
    content = message.content
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
