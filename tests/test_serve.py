"""The web page and the API: right answers, limits, escaping, and a person with a browser."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from chromium import ABSENT, DESKTOP, PHONE, Browser, find_chromium
from html_page import Page
from tiny_png import png

from vdr_db.cli.demo import unpack_sample
from vdr_db.errors import ConfigError, InputError, StoreError
from vdr_db.readers import read_records

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from vdr_db.budget import Budget  # noqa: E402
from vdr_db.serve import SearchService, listen, make_app  # noqa: E402
from vdr_db.serve.server import make_server  # noqa: E402

QUERY = "play a card game against the computer"
TEXTS = 400
HOSTILE = "</title><script>alert(1)</script> <img src=x onerror=y> ' \" & \u202e"
SMALL = Budget(query_characters=200, page_size=20, depth=200, upload_bytes=20_000)
HOME = Path(__file__).parents[1]

THUMBNAIL = png(24, 24, lambda x, y: (10 * x, 120, 10 * y))


class PictureOfAGame:
    """Stands for an image encoder: every picture is a card game."""

    def __init__(self, encoder):
        self.encoder = encoder

    def encode_images(self, images):
        if not all(image.startswith(b"\x89PNG") for image in images):
            raise InputError("no PNG at /secret/place")
        return self.encoder.encode_queries(["card game"] * len(images))


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_splade):
    """The first texts of the demo in an embedded Qdrant, and some that mean harm."""
    from vdr_db.connectors import VDRQdrant

    folder = tmp_path_factory.mktemp("serve")
    sample = unpack_sample(folder / "debian")
    records = list(islice(read_records(sample / "corpus.jsonl"), TEXTS))
    thumbnail = f"data:image/png;base64,{base64.b64encode(THUMBNAIL).decode()}"
    odd = [
        (12, "card game with a numbered id", {"metadata": {"section": "games"}}),
        ("12", "card game with a written id", {"metadata": {"section": "games"}}),
        (HOSTILE, f"card game {HOSTILE}", {"title": HOSTILE, "metadata": {"section": "<b>"}}),
        ("pic", "a card game", {"metadata": {"section": "games"}, "thumbnail": thumbnail}),
        ("bad", "a card game", {"metadata": {"section": "games"}, "thumbnail": "/etc/passwd"}),
    ]
    with VDRQdrant("texts", tiny_splade, path=folder / "store") as made:
        made.add_texts(
            [*(record.text for record in records), *(text for _, text, _ in odd)],
            ids=[*(record.id for record in records), *(id for id, _, _ in odd)],
            payloads=[*(record.payload for record in records), *(extra for _, _, extra in odd)],
        )
    return folder / "store"


@pytest.fixture(scope="module")
def service(store, tiny_splade):
    from vdr_db.connectors import VDRQdrant

    collection = VDRQdrant("texts", tiny_splade, path=store)
    made = SearchService(collection, tiny_splade, images=PictureOfAGame(tiny_splade), budget=SMALL)
    yield made
    made.close()


@contextmanager
def running(app):
    """The application behind a real server on a free port."""
    address = listen("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address.socket]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        yield address
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        address.socket.close()


@pytest.fixture(scope="module")
def site(service):
    with running(make_app(service, hosts=["books.example"])) as address:
        yield address


@pytest.fixture(scope="module")
def client(site):
    with httpx.Client(base_url=site.url, timeout=120, trust_env=False) as made:
        yield made


def found(client, **arguments):
    answer = client.get("/api/search", params=arguments)
    assert answer.status_code == 200, answer.text
    return answer.json()


# Answers


def test_hits_are_those_of_the_collection(client, service):
    answer = found(client, q=QUERY, limit=10)
    expected = service.collection.search(QUERY, limit=10)
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
    for hit, wanted in zip(answer["hits"], expected, strict=True):
        assert hit["score"] == pytest.approx(wanted.score, rel=1e-6)
        assert hit["payload"] == wanted.payload
        shares = [word["product"] for word in hit["words"]]
        assert sum(shares) == pytest.approx(hit["score"], rel=1e-4)
        assert shares == sorted(shares, reverse=True)
        for mark in hit["marks"]:
            assert re.fullmatch(r"\S+", hit["snippet"][mark["start"] : mark["stop"]])
        marked = [mark["product"] for mark in hit["marks"]]
        assert max(marked, default=0) <= hit["score"] * (1 + 1e-6)
    best = answer["hits"][0]
    assert "game" in {best["snippet"][m["start"] : m["stop"]].lower() for m in best["marks"]}
    assert found(client, q="")["hits"] == []
    assert found(client, q="   ")["counted"] == 0


def test_pages_follow_each_other(client):
    whole = [hit["id"] for hit in found(client, q=QUERY, limit=20)["hits"]]
    parts = [found(client, q=QUERY, limit=5, offset=at)["hits"] for at in (0, 5, 10, 15)]
    assert [hit["id"] for part in parts for hit in part] == whole
    deep = found(client, q=QUERY, limit=20, offset=200)
    assert deep["counted"] >= 200
    assert len({*whole, *(hit["id"] for hit in deep["hits"])}) == 20 + len(deep["hits"])
    answer = found(client, q="card game", facet="metadata.section:<b>")
    assert (answer["has_more"], answer["counted"], len(answer["hits"])) == (False, 1, 1)
    last = client.get("/", params={"q": QUERY, "page": 2}).text
    assert 'rel="prev"' in last
    assert "11–20 of" in last


def test_facets_count_and_narrow(client, service):
    assert client.get("/api/info").json()["facets"] == ["metadata.section"]
    answer = found(client, q=QUERY, limit=20)
    (facet,) = answer["facets"]
    hits = service.collection.search(QUERY, limit=200)
    expected = Counter(hit.payload["metadata"]["section"] for hit in hits)
    assert {value["value"]: value["count"] for value in facet["values"]} == dict(expected)
    games = found(client, q=QUERY, limit=20, facet="metadata.section:games")
    assert {hit["payload"]["metadata"]["section"] for hit in games["hits"]} == {"games"}
    (narrowed,) = games["facets"]
    assert [v["value"] for v in narrowed["values"] if v["chosen"]] == ["games"]
    assert len(narrowed["values"]) == len(facet["values"])  # others can still be chosen
    both = found(client, q=QUERY, limit=20, facet=["metadata.section:games", "metadata.section:x"])
    assert [hit["id"] for hit in both["hits"]] == [hit["id"] for hit in games["hits"]]
    nothing = found(client, q=QUERY, facet="metadata.section:nowhere")
    assert nothing["hits"] == []
    refused = client.get("/api/search", params={"q": QUERY, "facet": "text:x"})
    assert (refused.status_code, "KEY:VALUE" in refused.json()["detail"]) == (400, True)


def test_filters_are_those_of_collections(client, service):
    games = {"metadata.section": "games"}
    answer = found(client, q=QUERY, limit=20, filter=json.dumps(games))
    expected = service.collection.search(QUERY, limit=20, filter=games)
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
    (facet,) = answer["facets"]
    assert [value["value"] for value in facet["values"]] == ["games"]
    # Facets narrow further, and are counted among what the filter keeps.
    others = {"not": games}
    chosen = found(
        client, q=QUERY, filter=json.dumps(others), facet="metadata.section:games", limit=20
    )
    assert chosen["hits"] == []
    counts = {value["value"]: value["count"] for value in chosen["facets"][0]["values"]}
    assert counts.pop("games") == 0
    assert counts
    image = png(8, 8, lambda x, y: (30 * x, 30 * y, 90))
    by_image = client.post(
        "/api/search/image", files={"image": image}, params={"filter": json.dumps(games)}
    ).json()
    assert {hit["payload"]["metadata"]["section"] for hit in by_image["hits"]} == {"games"}
    for wrong in ("{", "[]", "7", "null", '{"a": {"between": 3}}', '{"not": 3}', '{"not":' * 90):
        refused = client.get("/api/search", params={"q": QUERY, "filter": wrong[:200]})
        assert (refused.status_code, refused.json()["detail"][:7]) == (400, "filter:"), wrong


def test_unknown_parameters_of_the_api_are_refused(client):
    image = png(8, 8, lambda x, y: (30 * x, 30 * y, 90))
    for answer in (
        client.get("/api/search", params={"q": QUERY, "filters": "{}"}),
        client.get("/api/search", params={"q": QUERY, "filters": ""}),
        client.get("/api/explain", params={"q": QUERY, "filters": "1"}),
        client.get("/api/info", params={"filters": "1"}),
        client.post("/api/search/image", files={"image": image}, params={"filters": "1"}),
    ):
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("filters: unknown parameter")
    # A link to a page may have been decorated on its way.
    assert client.get("/", params={"q": QUERY, "utm_source": "mail"}).status_code == 200


def test_explanations_add_up(client):
    best = found(client, q=QUERY, limit=1)["hits"][0]
    answer = client.get("/api/explain", params={"q": QUERY, "id": best["id"]}).json()
    assert answer["score"] == pytest.approx(best["score"], rel=1e-5)
    assert sum(reason["product"] for reason in answer["reasons"]) == pytest.approx(answer["score"])
    assert answer["document"]["positions"][0]["label"] == "[CLS]"
    alone = client.get("/api/explain", params={"q": QUERY}).json()
    assert (alone["document"], alone["query"]) == (None, answer["query"])
    for kind, text in (("number", "numbered"), ("text", "written"), ("any", "written")):
        answer = client.get("/api/explain", params={"q": "card", "id": "12", "kind": kind}).json()
        assert text in answer["document"]["text"]
    for id in ("nobody", "../../etc/passwd", "9" * 40, "\ud83d", "x" * 512):
        shown = client.get(f"/api/explain?q=card&id={id.encode('utf-8', 'replace').decode()}")
        assert shown.status_code == 404, shown.text
        assert "/" not in shown.json()["detail"]


def test_the_api_is_described(client):
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/api/search",
        "/api/search/image",
        "/api/explain",
        "/api/info",
        "/api/encode",
        "/embed_sparse",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    limit = next(
        p for p in described["paths"]["/api/search"]["get"]["parameters"] if p["name"] == "q"
    )
    assert limit["schema"]["maxLength"] == 200
    for page in ("/docs", "/redoc"):
        assert client.get(page).status_code == 404


def test_info_names_no_place(client, service, store):
    info = client.get("/api/info").json()
    assert info["texts"] == TEXTS + 5
    assert info["images"] is True
    assert str(store.parent) not in json.dumps(info)
    assert "/" not in info["model"]
    assert f"{TEXTS + 5:,} documents" in client.get("/").text


def test_many_ask_at_once(client):
    queries = [QUERY, "burn a disc", "network traffic", "mail server"] * 4
    alone = {query: found(client, q=query)["hits"] for query in set(queries)}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda query: found(client, q=query)["hits"], queries))
    assert [alone[query] for query in queries] == together


# What is refused


@pytest.mark.parametrize(
    "arguments",
    [
        {"q": "x" * 201},
        {},
        {"q": "x", "limit": 21},
        {"q": "x", "limit": 0},
        {"q": "x", "offset": -1},
        {"q": "x", "offset": 201},
        {"q": "x", "limit": "many"},
        {"q": "x", "facet": ["a:b"] * 21},
    ],
)
def test_limits_of_a_search(client, arguments):
    refused = client.get("/api/search", params=arguments)
    assert refused.status_code == 422
    assert refused.json()["detail"]


def test_pages_are_refused_with_a_page(client):
    for path, status in (
        ("/?q=" + "x" * 201, 422),
        ("/?q=x&page=0", 422),
        ("/?q=x&page=1000000", 422),
        ("/explain?q=x&id=nobody", 404),
        ("/nowhere", 404),
        ("/%2e%2e/%2e%2e/etc/passwd", 404),
        ("/style.css/../../../etc/passwd", 404),
    ):
        refused = client.get(path)
        assert refused.status_code == status, path
        assert "Search again" in refused.text
        assert "root:" not in refused.text
    assert client.post("/api/search", content=b"x").status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:99", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("books.example", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("[::1]evil.example", 421),
        ("[::1].evil.example:80", 421),
        ("[127.0.0.1]", 421),
        ("::1", 421),
        ("[localhost]evil.example", 421),
        ("localhost:80:evil.example", 421),
        ("localhost:x", 421),
        ("", 421),
    ],
)
def test_only_known_hosts_are_served(client, host, status):
    assert client.get("/api/info", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:99", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "http://localhost:99"}, 200),
        ({"origin": "https://books.example"}, 200),  # behind a proxy
        ({"origin": "null", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:98"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://localhost:99", "sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_send_images(client, headers, status):
    image = png(8, 8, lambda x, y: (30 * x, 30 * y, 90))
    for path in ("/api/search/image", "/image"):
        asked = {"host": "localhost:99", **headers}
        answer = client.post(path, files={"image": image}, headers=asked)
        assert answer.status_code == status, answer.text
    assert client.get("/", headers={"host": "localhost:99", **headers}).status_code == 200


def test_large_bodies_are_not_read(client, site):
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    large = part + b"x" * 200_000 + b"\r\n--b--\r\n"
    chunks = [large[at : at + 10_000] for at in range(0, len(large), 10_000)]
    seen = []
    for content in (large, iter(chunks)):  # with its length said, and without
        try:
            seen.append(client.post("/api/search/image", content=content, headers=FORM).status_code)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            seen.append(413)  # closed while we were still sending
    assert seen == [413, 413]
    host, port = site.socket.getsockname()[:2]
    with socket.create_connection((host, port), timeout=60) as raw:
        raw.sendall(
            b"POST /api/search/image HTTP/1.1\r\nhost: localhost\r\n"
            b"content-length: 99999999999999999999\r\n\r\n"
        )
        assert raw.recv(1000)[9:12] in (b"400", b"413")
    assert found(client, q=QUERY)["hits"]


FORM = {"content-type": "multipart/form-data; boundary=b"}


def test_every_answer_has_its_headers(client):
    for path in ("/", f"/?q={QUERY}", "/style.css", "/api/info", "/nowhere", "/api/search"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers
    refused = client.get("/", headers={"host": "evil.example"})
    assert refused.headers["x-frame-options"] == "DENY"


def test_texts_cannot_write_html(client):
    for path, arguments in (
        ("/", {"q": f"card game {HOSTILE}"}),
        ("/", {"q": "card game", "facet": "metadata.section:<b>"}),
        ("/explain", {"q": f"card {HOSTILE}", "id": HOSTILE}),
        ("/explain", {"q": HOSTILE}),
        ("/", {"q": "x", "facet": HOSTILE}),
        ("/explain", {"q": "x", "id": HOSTILE + "!"}),
    ):
        page = client.get(path, params=arguments).text
        assert page.startswith("<!doctype html>")
        assert "\u202e" not in page
        parsed = Page(page)
        assert not {"script", "b", "iframe"} & set(parsed.tags)
        assert parsed.tags.count("img") <= 1  # the thumbnail
        names = {name for name, _ in parsed.attributes}
        assert not {name for name in names if name.startswith("on") or name == "style"}


def test_thumbnails_are_data_or_nothing(client):
    page = client.get("/", params={"q": "a card game"}).text
    assert page.count("<img ") == 1
    assert f'<img src="data:image/png;base64,{base64.b64encode(THUMBNAIL).decode()}"' in page
    assert "passwd" not in page


def test_a_store_that_fails_says_nothing_of_itself(store, tiny_splade, caplog):
    class Broken:
        text_key, documents = "text", "encoded"
        store = SimpleNamespace(stamp=None)

        def ids(self):
            return iter(())

        def get(self, ids, with_rows=False):
            return []

        def search(self, *_, **__):
            raise StoreError("/secret/place is gone")

        def close(self):
            pass

    app = make_app(SearchService(Broken(), tiny_splade))
    with running(app) as address, httpx.Client(base_url=address.url, trust_env=False) as client:
        with caplog.at_level(logging.ERROR, logger="vdr_db.serve.app"):
            refused = client.get("/api/search", params={"q": "tea"})
        assert refused.status_code == 503
        assert "secret" not in refused.text
        assert "/secret/place" in caplog.text
        assert client.get("/api/search/image").status_code == 404  # no images here
        assert client.get("/?q=tea").status_code == 503


# Images


def test_an_uploaded_image_is_searched(client):
    image = png(8, 8, lambda x, y: (30 * x, 30 * y, 90))
    answer = client.post("/api/search/image", files={"image": image}, params={"limit": 5})
    assert answer.status_code == 200, answer.text
    assert answer.json()["hits"] == found(client, q="card game", limit=5)["hits"]
    page = client.post("/image", files={"image": image})
    assert "What the image says" in page.text
    refused = client.post("/api/search/image", files={"image": b"no image"})
    assert (refused.status_code, "secret" in refused.text) == (400, False)
    assert client.post("/api/search/image").status_code == 422
    large = png(100, 100, lambda x, y: (hash((x, y)) % 256, x * y % 256, 7))
    assert SMALL.upload_bytes < len(large) < SMALL.upload_bytes + 60_000
    assert client.post("/api/search/image", files={"image": large}).status_code == 413


def test_an_image_encoder_of_another_vocabulary_is_refused(tiny_splade, tmp_path):
    pytest.importorskip("PIL")
    from image_folders import write_cross_modal

    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.serve import ImageUploads

    images = ImageEncoder.from_pretrained(write_cross_modal(tmp_path / "m"), device="cpu")
    with pytest.raises(ConfigError, match="trained with this text encoder"):
        ImageUploads(images, tiny_splade)
    uploads = ImageUploads(images, images)
    assert len(uploads.encode_images([THUMBNAIL, THUMBNAIL])) == 2
    with pytest.raises(InputError, match="cannot be read"):
        uploads.encode_images([THUMBNAIL, b"no image"])


def test_facets_that_were_asked_for(store, tiny_splade, service):
    made = SearchService(service.collection, tiny_splade, facets=["title"])
    assert [facet.key for facet in made.facets] == ["title"]


# A person with a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip(ABSENT)
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_person_searches_narrows_pages_and_asks_why(browser, site, size, tmp_path):
    def look(name):
        path = browser.screenshot(tmp_path / f"serve_{name}_{size[0]}.png")
        if folder := os.environ.get("VDR_DB_KEEP_SCREENSHOTS"):
            Path(folder, path.name).write_bytes(path.read_bytes())
        browser.assert_readable()
        assert all(url.startswith((site.url, "data:")) for url in browser.requested)

    browser.resize(size)
    browser.open(site.url)
    look("home")
    browser.type("input[type=search]", QUERY)
    assert browser.run("document.querySelector('input[type=search]').value") == QUERY
    assert browser.run("document.querySelectorAll('article.hit').length") == 10
    assert browser.run("document.querySelectorAll('article.hit mark').length") > 5
    right = "getBoundingClientRect().right"
    edges = f"[...document.querySelectorAll('.score')].map(score => Math.round(score.{right}))"
    assert len(set(browser.run(edges))) == 1
    look("results")
    browser.click("a[rel=next]")
    assert "11–20" in browser.run("document.querySelector('.count').textContent")
    browser.click(".facet a[href*=games]")
    assert browser.run("document.querySelector('.chosen .value').textContent") == "games"
    assert "1–10" in browser.run("document.querySelector('.count').textContent")
    look("narrowed")
    browser.click("article.hit h2 a")
    assert browser.run("document.querySelector('h1').textContent").startswith("Why ")
    assert browser.run("document.querySelectorAll('svg.cloud').length") == 2
    look("why")
    browser.open(f"{site.url}?q=zzzzqqqq%20xxyyzz&facet=metadata.section%3Anowhere")
    look("nothing")
    image = tmp_path / "picture.png"
    image.write_bytes(png(8, 8, lambda x, y: (30 * x, 30 * y, 90)))
    browser.upload("input[type=file]", image)
    browser.click("form.upload button")
    assert "What the image says" in browser.run("document.body.textContent")
    look("image")


# Images in a collection


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, tiny_splade_folder):
    """A server of a collection of images with thumbnails and of texts, as the command makes it."""
    pytest.importorskip("PIL.Image")
    from image_folders import VIT, pixels, write_cross_modal
    from PIL import Image
    from tokenizers import Tokenizer

    from vdr_db import CrossModalEncoder
    from vdr_db.connectors import VDRQdrant
    from vdr_db.serve import ImageUploads

    folder = tmp_path_factory.mktemp("gallery")
    tokenizer = Tokenizer.from_file(str(tiny_splade_folder / "tokenizer.json"))
    model = write_cross_modal(folder / "model", tokenizer=tokenizer, topk=2000, vit=VIT)
    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    files = folder / "images"
    files.mkdir()
    for i in range(8):
        Image.fromarray(pixels(120, 90 + 10 * (i % 3), seed=i)).save(files / f"{i}.png")
    collection = VDRQdrant("gallery", encoder, path=":memory:")
    texts = [f"the green sea number {i}" for i in range(6)]
    collection.add_texts(texts, payloads=[{"modality": "text"}] * 6)
    collection.add_images(files, thumbnail_px=64)
    collection.add_images([files / "0.png"], ids=["no thumbnail"])
    for file in files.iterdir():
        file.unlink()
    uploads = ImageUploads(encoder.image, encoder.text)
    service = SearchService(collection, encoder.text, images=uploads)
    with running(make_app(service)) as address:
        yield address


def test_images_are_hits_with_thumbnails_and_reasons(gallery):
    with httpx.Client(base_url=gallery.url, timeout=120, trust_env=False) as client:
        answer = found(client, q="the green sea", limit=20)
        payloads = {hit["id"]: hit["payload"] for hit in answer["hits"]}
        assert payloads["3.png"]["thumbnail"].startswith("data:image/jpeg;base64,")
        (facet,) = answer["facets"]
        assert facet["key"] == "modality"
        counts = {value["value"]: value["count"] for value in facet["values"]}
        assert counts == {"image": 9, "text": 6}
        page = client.get("/", params={"q": "the green sea", "facet": "modality:image"}).text
        assert page.count("<img ") == 8
        assert page.count('<article class="hit">') == 9
        why = client.get("/explain", params={"q": "the green sea", "id": "3.png"}).text
        assert why.count("<img ") == 2
        told = client.get("/api/explain", params={"q": "the green sea", "id": "3.png"}).json()
        score = next(hit["score"] for hit in answer["hits"] if hit["id"] == "3.png")
        assert told["score"] == pytest.approx(score, rel=1e-5)
        small = base64.b64decode(payloads["3.png"]["thumbnail"].partition(",")[2])
        by_image = client.post("/api/search/image", files={"image": small}).json()["hits"]
        assert by_image[0]["payload"]["modality"] == "image"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_person_looks_at_images(browser, gallery, size, tmp_path):
    def look(name):
        path = browser.screenshot(tmp_path / f"gallery_{name}_{size[0]}.png")
        if folder := os.environ.get("VDR_DB_KEEP_SCREENSHOTS"):
            Path(folder, path.name).write_bytes(path.read_bytes())
        browser.assert_readable()

    browser.resize(size)
    browser.open(gallery.url)
    browser.type("input[type=search]", "the green sea")
    browser.click(".facet a[href*=image]")
    assert browser.run("document.querySelectorAll('article.hit').length") == 9
    assert browser.run("document.querySelectorAll('article.hit img').length") == 8
    shares = browser.run("[...document.querySelectorAll('.words .n')].map(n => +n.textContent)")
    assert min(shares) > 0, "no share is shown as zero"
    look("results")
    browser.click("article.hit img + div h2 a")
    assert browser.run("document.querySelectorAll('.reasons figure img').length") == 1
    look("why")
    image = tmp_path / "picture.png"
    image.write_bytes(png(40, 40, lambda x, y: (6 * x, 6 * y, 90)))
    browser.upload("input[type=file]", image)
    browser.click("form.upload button")
    assert browser.run("document.querySelectorAll('article.hit img').length") >= 1
    look("upload")
