"""The OpenAPI document: FastAPI's routes, and the hot ones from the models that check their bodies."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from llmserve.gateway.route import PlainRoute
from llmserve.settings import Limits

SCHEMAS = "#/components/schemas/"
REFUSED = {
    "description": "OpenAI's error envelope",
    "content": {"application/json": {"schema": {"$ref": SCHEMAS + "Error"}}},
}


def text_header(description: str) -> dict[str, Any]:
    """A header of answers."""
    return {"description": description, "schema": {"type": "string"}}


EVERY_ANSWER = {
    "x-request-id": text_header("The request's own, or a new one"),
    "traceparent": text_header("The trace's id, and this gateway's part of it (W3C Trace Context)"),
    "x-llm-overhead-us": text_header("Microseconds that were the gateway's own"),
}
TEXT_ANSWER = EVERY_ANSWER | {
    "x-llm-model": text_header("Which model answered"),
    "x-llm-cache": text_header("hit, miss or bypass"),
    "age": text_header("Of a hit, in seconds"),
}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
REQUEST_HEADERS = [
    {
        "name": "cache-control",
        "in": "header",
        "description": "no-store, no-cache or max-age=SECONDS; max-age lets sampled answers be kept too",
        "schema": {"type": "string"},
    },
    {
        "name": "x-llm-deadline-ms",
        "in": "header",
        "description": "After so many milliseconds nobody wants the answer any more",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    },
]
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def describe(cold: FastAPI, plain: list[PlainRoute], limits: Limits) -> dict[str, Any]:
    """The document. `plain`: the routes that FastAPI does not know."""
    if cold.openapi_schema:
        return cold.openapi_schema
    document = get_openapi(title=cold.title, version=cold.version, routes=cold.routes)
    components = document.setdefault("components", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    schemas = components.setdefault("schemas", {})
    for unused in "HTTPValidationError", "ValidationError":
        schemas.pop(unused, None)
    schemas["Error"] = ERROR
    paths = document["paths"]
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"].pop("422", None)

    def known(model: type[BaseModel]) -> dict[str, Any]:
        """The schema of `model`, which stands among the components from here on."""
        schema = model.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        return schema

    for route in plain:
        known(route.answer)
        answered: dict[str, Any] = {"application/json": {"schema": {"$ref": SCHEMAS + route.answer.__name__}}}
        if route.body is None:
            fine = {"description": "Yes", "headers": EVERY_ANSWER, "content": answered}
            paths[route.path] = {"get": {"security": [], "responses": {"200": fine}}}
            continue
        answered["text/event-stream"] = {"schema": EVENT}
        described = "The answer; server-sent events if 'stream' is true"
        fine = {"description": described, "headers": TEXT_ANSWER, "content": answered}
        schema = bounded(known(route.body), limits)
        paths[route.path] = {
            method.lower(): asking(method, route.body, schema) | {"responses": {"200": fine}}
            for method in route.methods
        }
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"]["default"] = REFUSED
    cold.openapi_schema = document
    return document


def bounded(schema: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The schema with this gateway's limits in it."""
    for name in "max_tokens", "max_completion_tokens":
        for choice in schema["properties"].get(name, {}).get("anyOf", []):
            if choice.get("type") == "integer":
                choice["maximum"] = limits.max_tokens
    return schema


def asking(method: str, model: type[BaseModel], schema: dict[str, Any]) -> dict[str, Any]:
    """What an operation takes: `model` as its body, or in its query, and headers."""
    if method != "GET":
        body = {"application/json": {"schema": {"$ref": SCHEMAS + model.__name__}}}
        return {"requestBody": {"required": True, "content": body}, "parameters": REQUEST_HEADERS}
    required = schema.get("required", [])
    parameters = [
        {"name": name, "in": "query", "required": name in required, "schema": without_null(field)}
        for name, field in schema["properties"].items()
    ]
    return {"parameters": [*parameters, *REQUEST_HEADERS]}


def without_null(field: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: what is not wanted is left out."""
    choices = [choice for choice in field.get("anyOf", []) if choice.get("type") != "null"]
    return choices[0] if len(choices) == 1 else field
