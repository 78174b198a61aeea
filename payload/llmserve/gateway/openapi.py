"""The OpenAPI document: FastAPI's routes, and the hot ones from the pydantic models that validate their bodies."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from llmserve.gateway.route import PlainRoute

SCHEMAS = "#/components/schemas/"
REFUSED = {
    "description": "OpenAI's error envelope",
    "content": {"application/json": {"schema": {"$ref": SCHEMAS + "Error"}}},
}


def text_header(description: str) -> dict[str, Any]:
    """A response header."""
    return {"description": description, "schema": {"type": "string"}}


EVERY_ANSWER = {
    "x-request-id": text_header("The request's id, or a generated one"),
    "traceparent": text_header("The trace id, and this gateway's span in it (W3C Trace Context)"),
    "x-llm-overhead-us": text_header("Overhead of the gateway, in microseconds"),
}
TEXT_ANSWER = EVERY_ANSWER | {
    "x-llm-response-id": text_header("The answer's id, for rating it"),
    "x-llm-model": text_header("The model that answered"),
    "x-llm-cache": text_header("hit, miss or bypass"),
    "age": text_header("Age of a cached answer, in seconds"),
}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
REQUEST_HEADERS = [
    {
        "name": "cache-control",
        "in": "header",
        "description": "no-store, no-cache or max-age=SECONDS; with max-age, sampled answers are cached too",
        "schema": {"type": "string"},
    },
    {
        "name": "x-llm-deadline-ms",
        "in": "header",
        "description": "Deadline for the whole answer, in milliseconds",
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


def describe(cold: FastAPI, plain: list[PlainRoute]) -> dict[str, Any]:
    """The OpenAPI document. `plain`: the routes outside FastAPI."""
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

    def add_schema(model: type[BaseModel]) -> dict[str, Any]:
        """The schema of `model`, which is added to the components."""
        schema = model.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        return schema

    for route in plain:
        add_schema(route.answer)
        answered: dict[str, Any] = {"application/json": {"schema": {"$ref": SCHEMAS + route.answer.__name__}}}
        if route.body is None:
            fine = {"description": "Success", "headers": EVERY_ANSWER, "content": answered}
            paths[route.path] = {"get": {"security": [], "responses": {"200": fine}}}
            continue
        described = "The answer"
        if "stream" in route.body.model_fields:
            answered["text/event-stream"] = {"schema": EVENT}
            described += "; server-sent events if 'stream' is true"
        fine = {"description": described, "headers": TEXT_ANSWER, "content": answered}
        schema = add_schema(route.body)
        paths[route.path] = {
            method.lower(): asking(method, route.body, schema) | {"responses": {"200": fine}}
            for method in route.methods
        }
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"]["default"] = REFUSED
    cold.openapi_schema = document
    return document


def asking(method: str, model: type[BaseModel], schema: dict[str, Any]) -> dict[str, Any]:
    """Request body or query parameters of an operation that takes `model`, and its headers."""
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
    """The schema without null: a query omits a parameter instead."""
    choices = [choice for choice in field.get("anyOf", []) if choice.get("type") != "null"]
    return choices[0] if len(choices) == 1 else field
