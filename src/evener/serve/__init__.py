"""OpenAI-compatible HTTP over an engine; one file per wire format.

    app           create_app: endpoints, API key, OpenAPI document
    listen        a port                     server    run: the app on it, clean stop
    completions   /v1/completions            chat      /v1/chat/completions
    models        /v1/models, /version       tokenize  /tokenize, /detokenize
    health        /health                    metrics   /metrics
    ledger        /ledger                    served    /served

Below them, in the order a request meets it: `fields` (names, JSON), `params` (types, ranges), `front` (prompt to
sequences), `vocabulary` (text and tokens), `generation` (answers to text), `detokenize`, `sse`, `wire`, `errors`; and
`query`, the parameters of what is only read.
"""
