"""Parameters behind the question mark of a read-only endpoint: known ones, each once."""

import math
from typing import Any

from fastapi import Request

from evener.errors import InvalidRequest, UnsupportedParameter


def parameters(request: Request, path: str, known: dict[str, str]) -> dict[str, str]:
    """Name -> text. Raises UnsupportedParameter for one that `path` lacks, InvalidRequest for a repeated one."""
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise UnsupportedParameter(
                f"parameter {name[:64]!r} is unknown; {path} takes {', '.join(known)}", name[:64]
            )
        if name in given:
            raise InvalidRequest(f"{name} is given twice; give it once", name)
        given[name] = value
    return given


def seconds_of(given: dict[str, str], name: str) -> float:
    """A length of time. Raises InvalidRequest."""
    try:
        value = float(given[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e9:
        raise InvalidRequest(f"{name}={given[name][:64]!r} is no number of seconds from 0 to 1e9", name)
    return value


def declare_parameters(described: dict[str, Any], known: dict[str, str]) -> None:
    """Add the parameters, and what is answered to wrong ones or without a ledger, to a route's description."""
    described["openapi_extra"] = {
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
            for name, text in known.items()
        ]
    }
    described["responses"][400] = described["responses"][401]
    described["responses"][503] = described["responses"][500]
