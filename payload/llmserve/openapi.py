"""The OpenAPI document: FastAPI's routes, and the hot ones from the models that check their bodies."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from llmserve.settings import Limits

SCHEMAS = "#/components/schemas/"
REFUSED = {
    "description": "OpenAI's error envelope",
    "content": {"application/json": {"schema": {"$ref": SCHEMAS + "Error"}}},
}
ANSWERED = {
    "description": "The answer; server-sent events if 'stream' is true",
    "content": {"application/json": {}, "text/event-stream": {}},
}
FINE = {"description": "Yes", "content": {"application/json": {}}}
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


def describe(
    cold: FastAPI, hot: list[tuple[str, list[str], type[BaseModel]]], public: list[str], limits: Limits
) -> dict[str, Any]:
    """The document. `hot`: path, methods and body model of each route that FastAPI does not know."""
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
    for path, methods, model in hot:
        schema = bounded(model.model_json_schema(ref_template=SCHEMAS + "{model}"), limits)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        paths[path] = {method.lower(): asking(method, model, schema) for method in methods}
    for path in public:
        paths[path] = {"get": {"security": [], "responses": {"200": FINE}}}
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
    """An operation that takes `model` as its body, or in its query."""
    if method != "GET":
        body = {"application/json": {"schema": {"$ref": SCHEMAS + model.__name__}}}
        return {"requestBody": {"required": True, "content": body}, "responses": {"200": ANSWERED}}
    required = schema.get("required", [])
    parameters = [
        {"name": name, "in": "query", "required": name in required, "schema": without_null(field)}
        for name, field in schema["properties"].items()
    ]
    return {"parameters": parameters, "responses": {"200": ANSWERED}}


def without_null(field: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: what is not wanted is left out."""
    choices = [choice for choice in field.get("anyOf", []) if choice.get("type") != "null"]
    return choices[0] if len(choices) == 1 else field
