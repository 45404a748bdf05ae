"""The OpenAPI document: complete, and no request made from it (or against it) is answered with a 5xx."""

import json

import pytest
import schemathesis
from fake import EOS, MODEL, FakeEngine, tiny_tokenizer
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from evener.serve.app import create_app
from evener.serve.front import FrontConfig

CONFIG = FrontConfig(served_model_names=(MODEL,), eos_token_ids=(EOS,))
APP = create_app(FakeEngine(), tiny_tokenizer(), CONFIG)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


def test_document_names_every_path_and_resolves() -> None:
    document = APP.openapi()
    assert {path for path, methods in document["paths"].items() if "post" in methods} == {
        "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize",
    }  # fmt: skip
    text = json.dumps(document)
    for name in ("CompletionRequest", "ChatRequest", "ErrorBody", "ChatCompletion", "Health"):
        assert f'"#/components/schemas/{name}"' in text
        assert name in document["components"]["schemas"]
    temperature = document["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert temperature == {"type": "number", "minimum": 0, "maximum": 100, "default": 1.0}


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_made_up_requests_get_what_the_document_says(case: schemathesis.Case) -> None:
    case.call_and_validate(
        checks=[not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    )
