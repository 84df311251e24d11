"""Odd requests: the service answers each, never with an error of its own, and goes on."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import pytest

httpx = pytest.importorskip("httpx")
for module in ("fastapi", "prometheus_client", "orjson"):
    pytest.importorskip(module)

from vdr_db.budget import Budget  # noqa: E402
from vdr_db.serve import SearchService, make_app  # noqa: E402

REQUESTS = 400
SEED = 20
VALUES = [
    *("", "0", "-1", "1e9", "99999999999999999999", "tea", "\0", "\ud800x", "é" * 99, "{", "[]"),
    *("null", "true", '{"a":{"gte":1}}', '{"any":[]}', "a:b", "%00", "../../etc/passwd", "x" * 999),
]
OBJECTS = [None, True, 0, -1, 1e308, 2**70, "tea", "", "\ud800", [], {}, ["tea"], [["tea"]]]
NAMES = {
    "/api/search": ["q", "limit", "offset", "facet", "filter", "odd"],
    "/api/explain": ["q", "id", "kind", "odd"],
    "/": ["q", "page", "facet", "odd"],
    "/explain": ["q", "id", "kind"],
    "/api/info": ["odd"],
    "/embed_sparse": ["inputs", "truncate", "truncation_direction", "prompt_name", "odd"],
    "/api/encode": ["texts", "images", "side", "odd"],
    "/documents": ["documents", "ids", "odd"],
    "/api/search/image": ["image"],
    "/nowhere": ["q"],
}
METHODS = ["GET", "POST", "HEAD", "DELETE", "PUT", "OPTIONS"]
SENT = ("/embed_sparse", "/api/encode", "/documents")


def odd(choice, depth=0):
    """A JSON value that fits, or does not."""
    if depth < 3 and choice.random() < 0.4:
        if choice.random() < 0.5:
            return [odd(choice, depth + 1) for _ in range(choice.randrange(4))]
        names = ["id", "text", "payload", "vector"]
        return {choice.choice(names): odd(choice, depth + 1) for _ in range(choice.randrange(4))}
    return choice.choice(OBJECTS)


def request(choice):
    path = choice.choice(list(NAMES))
    names = choice.sample(NAMES[path], choice.randint(0, len(NAMES[path])))
    method = "POST" if path in SENT else "GET"
    if choice.random() < 0.25:
        method = choice.choice(METHODS)
    values = [(name, choice.choice(VALUES)) for name in names]
    safe = [(name, value.encode("utf-8", "replace").decode()) for name, value in values]
    options = {"params": safe if method in ("GET", "HEAD") or choice.random() < 0.2 else []}
    if method in ("POST", "DELETE", "PUT"):
        body = json.dumps({name: odd(choice) for name in names}).encode()
        if choice.random() < 0.2:
            at = choice.randrange(len(body))
            body = body[:at] + bytes([choice.randrange(256)]) + body[at + 1 :]
        kinds = ["application/json"] * 5 + ["text/plain", "multipart/form-data; boundary=b", "odd"]
        options |= {"content": body, "headers": {"content-type": choice.choice(kinds)}}
    return method, path, options


def test_odd_requests_are_answered(tiny_splade, caplog):
    from vdr_db.connectors import VDRQdrant

    collection = VDRQdrant("texts", tiny_splade, path=":memory:")
    collection.add_texts(["tea leaves", "a giraffe"], ids=["tea", 7], payloads=[{"a": 1}, {"a": 2}])
    service = SearchService(collection, tiny_splade, budget=Budget(texts=4, text_characters=500))
    app = make_app(service, writes=True)
    choice, seen = random.Random(SEED), Counter()

    async def ask_all():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for _ in range(REQUESTS):
                method, path, options = request(choice)
                answer = await client.request(method, path, **options)
                assert answer.status_code < 500, (method, path, options, caplog.text[-2000:])
                assert "Traceback" not in answer.text
                seen[answer.status_code] += 1
            found = await client.get("/api/search", params={"q": "tea"})
            assert found.status_code == 200

    try:
        asyncio.run(ask_all())
    finally:
        service.close()
    print(dict(seen))  # noqa: T201, counts for the log of CI
    assert {200, 405, 422} <= set(seen)
