"""The OpenAPI description, told as the service answers: errors, methods, HEAD."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import Route

__all__ = ["describe", "methods_of"]

ERRORS = {
    400: "The request cannot be used; the detail says why.",
    401: "The API key is missing or another one.",
    403: "A page of another site sent this.",
    404: "There is no such document.",
    405: "The path has no such method; `Allow` names those it has.",
    408: "The body came too slowly.",
    413: "The body, its contents or the answer are too large.",
    421: "The host name is not served here.",
    422: "A parameter is unknown, missing or impossible.",
    429: "Too many requests are going on.",
    503: "Too many requests are going on, or the store does not answer.",
}
_BODY = (403, 408)


def methods_of(app: FastAPI) -> dict[str, list[str]]:
    """Methods of every path, in alphabetical order."""
    found: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, Route):
            methods = set(route.methods or ())
            methods |= {"HEAD"} if "GET" in methods else set()
            found.setdefault(route.path, set()).update(methods)
    return {path: sorted(methods) for path, methods in found.items()}


def describe(app: FastAPI, *, has_key: bool) -> None:
    """Makes the description of an application, once all its routes are there."""
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    text = {"type": "string"}
    plain = {"type": "object", "properties": {"detail": text}, "required": ["detail"]}
    schemas["Refusal"] = plain
    schemas["EmbedRefusal"] = {
        "type": "object",
        "properties": {"error": text, "error_type": text, "detail": text},
        "required": ["error", "error_type", "detail"],
    }
    if has_key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        is_open = path in ("/healthz", "/readyz")
        name = "EmbedRefusal" if path == "/embed_sparse" else "Refusal"
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        for method, operation in operations.items():
            left_out = {404} if path != "/api/explain" else set()
            left_out |= set(_BODY) if method == "get" else set()
            left_out |= {429} if path != "/embed_sparse" else {503}
            left_out |= set() if has_key and not is_open else {401}
            left_out |= {400, 413} if is_open else set()
            left_out |= {422, 503} if path == "/healthz" else set()
            for status, said in ERRORS.items():
                if status not in left_out:
                    answer: dict[str, Any] = {"description": said, "content": content}
                    if status == 405:
                        answer["headers"] = {"Allow": {"schema": text}}
                    operation["responses"][str(status)] = answer
            if has_key and not is_open:
                operation["security"] = [{"key": []}]
        if "get" in operations:
            get = operations["get"]
            answers = {
                status: {key: value for key, value in answer.items() if key != "content"}
                for status, answer in get["responses"].items()
            }
            operations["head"] = {
                **{key: get[key] for key in ("tags", "parameters", "security") if key in get},
                "summary": f"The headers of GET {path}",
                "operationId": f"{get['operationId']}_head",
                "responses": answers,
            }
    app.openapi = lambda: made  # type: ignore[method-assign]
