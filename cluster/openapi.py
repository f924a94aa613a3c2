"""/openapi.json: the endpoint in OpenAPI 3.1, built from the bodies that the routes really check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.api import Body, ChatBody, CompletionBody
from cluster.errors import HTTP_ERRORS
from cluster.tokens import DetokenizeBody, TokenizeBody

Schema = dict[str, Any]

COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}


def openapi(*, needs_key: bool) -> Schema:
    """The document. needs_key: whether requests bring an API key."""
    schemas: Schema = {"Error": _error_schema(), "Usage": _usage_schema()}
    model = _object(
        id=TEXT,
        object={"const": "model"},
        created=COUNT,
        owned_by=TEXT,
        max_model_len={"type": ["integer", "null"]},
    )
    answer = _object(
        id=TEXT,
        object={"enum": ["text_completion", "chat.completion"]},
        created=COUNT,
        model=TEXT,
        choices={"type": "array", "items": {"type": "object"}, "minItems": 1},
        usage={"$ref": "#/components/schemas/Usage"},
    )
    tokens = _object(
        count=COUNT,
        max_model_len={"type": ["integer", "null"]},
        tokens={"type": "array", "items": COUNT},
        token_strs={"type": ["array", "null"], "items": TEXT},
    )
    models = _object(object={"const": "list"}, data={"type": "array", "items": model})
    paths: Schema = {
        "/health": {"get": _operation("This process is alive", 200, _object(status={"const": "ok"}))},
        "/ready": {"get": _ready()},
        "/v1/models": {"get": _operation("The model that is served", 200, models)},
        "/v1/models/{model}": {
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}],
            "get": _operation("The model under its name", 200, model),
        },
        "/v1/completions": {"post": _post("Go on with a text", CompletionBody, schemas, answer, stream=True)},
        "/v1/chat/completions": {
            "post": _post("Answer a conversation", ChatBody, schemas, answer, stream=True)
        },
        "/tokenize": {"post": _post("Text to token ids", TokenizeBody, schemas, tokens)},
        "/detokenize": {"post": _post("Token ids to text", DetokenizeBody, schemas, _object(prompt=TEXT))},
        "/metrics": {"get": _operation("Prometheus' text form", 200, TEXT, content="text/plain")},
    }
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "SPTS", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in ("/health", "/ready"):
            paths[path]["get"]["security"] = []
    return document


def _post(summary: str, body: type[Body], schemas: Schema, answer: Schema, *, stream: bool = False) -> Schema:
    operation = _operation(summary, 200, answer)
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _body_schema(body, schemas)}},
    }
    if stream:
        # Objects like the answer's, in parts; OpenAPI 3.1 has no words for the events of a stream.
        operation["responses"]["200"]["content"]["text/event-stream"] = {}
    return operation


def _operation(summary: str, status: int, answer: Schema, *, content: str = "application/json") -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: Schema = {str(status): {"description": "As asked", "content": {content: {"schema": answer}}}}
    for row in HTTP_ERRORS.values():
        responses.setdefault(str(row.status), {"description": row.type, "content": error})
    return {"summary": summary, "responses": responses}


def _ready() -> Schema:
    state = _object(
        ready={"type": "boolean"}, engines={"type": "object", "additionalProperties": {"type": "boolean"}}
    )
    content = {"application/json": {"schema": state}}
    return {
        "summary": "A token can be produced",
        "responses": {
            "200": {"description": "Ready", "content": content},
            "503": {"description": "Not ready", "content": content},
        },
    }


def _body_schema(body: type[Body], schemas: Schema) -> Schema:
    """The schema of a body; what it refers to goes into `schemas`. A field that is not supported may have the
    values that ask for nothing."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    for name, neutral in body.unsupported.items():
        schema["properties"][name] = {"enum": [None, *neutral], "description": "Not supported."}
    schemas[body.__name__] = schema
    return {"$ref": f"#/components/schemas/{body.__name__}"}


def _error_schema() -> Schema:
    rows = HTTP_ERRORS.values()
    return _object(
        error=_object(
            message=TEXT,
            type={"enum": sorted({row.type for row in rows})},
            param={"type": ["string", "null"]},
            code={"enum": [*sorted({row.code for row in rows if row.code is not None}), None]},
        )
    )


def _usage_schema() -> Schema:
    return _object(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=_object(cached_tokens=COUNT),
        spts={"type": "object"},
    )


def _object(**properties: Mapping[str, Any]) -> Schema:
    """An object that has all of these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}
