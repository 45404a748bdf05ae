"""The error tree as OpenAI's error JSON: `{"error": {"message", "type", "param", "code"}}`."""

import logging
import math
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.responses import Response

from evener.errors import EvenerError, Overloaded, Unauthorized

log = logging.getLogger("evener.serve")


class ErrorDetail(Struct, frozen=True):
    """What went wrong. `type` follows from the status, `code` from the error class."""

    message: str
    type: str
    param: str | None
    """The request field at fault."""
    code: str | None


class ErrorBody(Struct, frozen=True):
    """The body of every answer with a 4xx or 5xx status, and of an error event within a stream."""

    error: ErrorDetail


def error_body(error: Exception) -> ErrorBody:
    """The client's view of an error. One that Evener does not raise on purpose shows no inner detail."""
    if isinstance(error, EvenerError):
        param = getattr(error, "param", None)
        return ErrorBody(ErrorDetail(error.message, _type(error.status), param, error.code))
    return ErrorBody(
        ErrorDetail("internal error; the server's log has the details", _type(500), None, "internal_error")
    )


def error_response(error: Exception) -> Response:
    """The whole HTTP answer: status, body, Retry-After or WWW-Authenticate."""
    status = error.status if isinstance(error, EvenerError) else 500
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), status, headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Encode a msgspec record (or plain data)."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Every error that leaves the app has OpenAI's shape, those of routing included."""

    async def evener_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path[:200]}"
        headers = dict(error.headers or {})
        text = {
            404: f"there is no {where}; the paths are listed in /openapi.json",
            405: f"{where} is not allowed; use {headers.get('Allow', 'another method')}",
        }
        codes = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
        message = text.get(error.status_code, str(error.detail))
        detail = ErrorDetail(message, _type(error.status_code), None, codes.get(error.status_code))
        return json_response(ErrorBody(detail), error.status_code, headers)

    async def internal_error(request: Request, error: Exception) -> Response:
        return error_response(error)  # Starlette logs the traceback when it re-raises

    app.add_exception_handler(EvenerError, evener_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, internal_error)


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
