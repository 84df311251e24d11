"""The application: pages for people, `/api/...` for programs, the same answers for both."""

# FastAPI reads annotations when the routes are made, and some of them name what is inside a
# function: they must be objects, so `from __future__ import annotations` is left out.

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as AnyHTTPException

from vdr_db.budget import Budget
from vdr_db.connectors.ids import MAX_ID_BYTES
from vdr_db.errors import ConfigError, InputError, RejectedRows, VdrError
from vdr_db.explain.explanation import Explanation, Match
from vdr_db.filters import parse_filter
from vdr_db.serve.answers import (
    ExplainAnswer,
    InfoAnswer,
    SearchAnswer,
    explain_answer,
    search_answer,
)
from vdr_db.serve.description import describe, methods_of
from vdr_db.serve.documents import add_writing
from vdr_db.serve.encode import add_encoding
from vdr_db.serve.facets import Choice, parse_choices
from vdr_db.serve.guard import Guard, State, refusal, wants_page
from vdr_db.serve.pages import Asked, explain_page, page_html, style_sheet
from vdr_db.serve.service import Found, SearchService
from vdr_db.serve.uploads import UnreadableUpload
from vdr_db.serve.watch import METRICS_TYPE, Watch
from vdr_db.version import __version__

__all__ = ["make_app"]

PAGE = 10
MOST_CHOICES = 20

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def make_app(
    service: SearchService,
    *,
    hosts: Sequence[str] = (),
    api_key: str | None = None,
    writes: bool = False,
) -> FastAPI:
    """The web page and the API of one collection.

    Args:
        service: What is asked; closed when the application ends.
        hosts: Names this is reached under besides `localhost` and addresses.
        api_key: What every request must bring, but those for `/healthz` and `/readyz`; browsers ask
            for it as a password. None asks for nothing.
        writes: Whether documents can be stored and removed (`/documents`).

    Raises:
        ConfigError: The key is empty.
    """
    if api_key == "":
        raise ConfigError("`api_key` must not be empty; leave it out to let everybody in.")
    budget = service.budget
    state, watch = State(), Watch()
    service.batcher.watch = watch.encoded

    @asynccontextmanager
    async def close_at_the_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # The usual pages that show the description load scripts from elsewhere; it is at /openapi.json.
    app = FastAPI(
        title="vdr-db",
        version=__version__,
        description="Search one collection, see why a hit is a hit, and encode texts and images.",
        docs_url=None,
        redoc_url=None,
        lifespan=close_at_the_end,
        dependencies=[Depends(_refuse_unknown)],
    )
    app.state.service, app.state.budget = state, budget
    _add_errors(app)
    _add_pages(app, service, budget)
    _add_api(app, service, budget)
    _add_about(app, service, state, watch)
    decodes = asyncio.Semaphore(budget.decodes)
    add_encoding(app, service, budget, decodes)
    if service.images is not None:
        _add_uploads(app, service, budget, decodes)
    if writes:
        add_writing(app, service, budget, _asked)
    describe(app, has_key=api_key is not None)
    app.add_middleware(
        Guard,
        budget=budget,
        hosts=hosts,
        key=api_key,
        watch=watch,
        state=state,
        paths=frozenset(methods_of(app)),
    )
    return app


def _query(budget: Budget) -> object:
    return Annotated[str, Query(max_length=budget.query_characters, description="what to look for")]


def _filter(budget: Budget) -> object:
    said = 'a filter as JSON, such as {"year": {"gte": 2000}}'
    return Annotated[str | None, Query(max_length=budget.query_characters, description=said)]


def _add_api(app: FastAPI, service: SearchService, budget: Budget) -> None:
    Text, Filter = _query(budget), _filter(budget)

    @app.get("/api/search", tags=["search"])
    def api_search(
        q: Text,  # type: ignore[valid-type]
        limit: Annotated[int, Query(ge=1, le=budget.page_size)] = PAGE,
        offset: Annotated[int, Query(ge=0, le=budget.depth)] = 0,
        facet: Annotated[
            list[str], Query(description="KEY:VALUE, may be repeated", max_length=MOST_CHOICES)
        ] = [],  # noqa: B006  (FastAPI copies it)
        filter: Filter = None,  # type: ignore[valid-type]
    ) -> SearchAnswer:
        """Texts that match a query, with the words that made them match."""
        choices, conditions = _choices(facet, service), _conditions(filter)
        found = _asked(
            lambda: service.search(
                q, limit=limit, offset=offset, choices=choices, filter=conditions
            )
        )
        return search_answer(q, found, limit=limit, offset=offset)

    @app.get("/api/explain", tags=["search"])
    def api_explain(
        q: Text,  # type: ignore[valid-type]
        id: Annotated[str | None, Query(max_length=MAX_ID_BYTES)] = None,
        kind: Literal["any", "text", "number"] = "any",
    ) -> ExplainAnswer:
        """The words of a query; with an id, why that document matches.

        `kind` says whether the id is a text or a number; by default the text is looked for first.
        """
        return explain_answer(_explained(service, q, id, kind))

    @app.get("/api/info", tags=["about"])
    def api_info() -> InfoAnswer:
        """What is served."""
        return InfoAnswer(**_asked(service.info), version=__version__)


def _add_about(app: FastAPI, service: SearchService, state: State, watch: Watch) -> None:
    @app.get("/healthz", tags=["about"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["about"])
    def readyz() -> dict[str, str]:
        """Whether requests can be answered: the store is there, and nobody has stopped us."""
        if state.is_stopping or not service.is_ready():
            raise HTTPException(503, "Not now: the service stops, or its store does not answer.")
        return {"status": "ready"}

    @app.get("/metrics", tags=["about"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(watch.metrics(), media_type=METRICS_TYPE)


def _add_pages(app: FastAPI, service: SearchService, budget: Budget) -> None:
    Text = _query(budget)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page_search(
        q: Text = "",  # type: ignore[valid-type]
        page: Annotated[int, Query(ge=1, le=budget.depth // PAGE + 1)] = 1,
        facet: Annotated[list[str], Query(max_length=MOST_CHOICES)] = [],  # noqa: B006
    ) -> str:
        query: str = q
        asked = Asked(query, page, tuple(facet), budget, service.images is not None)
        if not query.strip():
            return page_html("home", "Search", asked, info=_asked(service.info))
        choices = _choices(facet, service)
        offset = (page - 1) * PAGE
        found = _asked(lambda: service.search(query, limit=PAGE, offset=offset, choices=choices))
        return page_html("results", query, asked, found=found, size=PAGE)

    @app.get("/explain", response_class=HTMLResponse, include_in_schema=False)
    def page_explain(
        q: Text,  # type: ignore[valid-type]
        id: Annotated[str | None, Query(max_length=MAX_ID_BYTES)] = None,
        kind: Literal["any", "text", "number"] = "any",
    ) -> str:
        asked = Asked(q, 1, (), budget, service.images is not None)
        return explain_page(asked, _explained(service, q, id, kind))

    @app.get("/style.css", include_in_schema=False)
    def page_style() -> Response:
        return Response(
            style_sheet(),
            media_type="text/css",
            headers={"cache-control": "max-age=3600"},
        )


def _add_uploads(
    app: FastAPI, service: SearchService, budget: Budget, decodes: asyncio.Semaphore
) -> None:
    Filter = _filter(budget)

    async def found_by(image: UploadFile, limit: int, filter: str | None = None) -> Found:
        conditions = _conditions(filter)

        def found() -> Found:
            data = image.file.read(budget.upload_bytes + 1)
            if len(data) > budget.upload_bytes:
                raise HTTPException(413, f"An image may have {budget.upload_bytes:,} bytes.")
            return _asked(lambda: service.search_image(data, limit=limit, filter=conditions))

        try:
            # Whoever waits here holds no thread, so that others are served.
            async with decodes:
                return await run_in_threadpool(found)
        except UnreadableUpload as error:
            raise HTTPException(400, str(error)) from error
        except InputError as error:
            raise HTTPException(400, "This file is no image that can be read.") from error

    @app.post("/api/search/image", tags=["search"])
    async def api_image(
        image: UploadFile,
        limit: Annotated[int, Query(ge=1, le=budget.page_size)] = PAGE,
        filter: Filter = None,  # type: ignore[valid-type]
    ) -> SearchAnswer:
        """Documents that match an image."""
        return search_answer("", await found_by(image, limit, filter), limit=limit, offset=0)

    @app.post("/image", response_class=HTMLResponse, include_in_schema=False)
    async def page_image(image: UploadFile) -> str:
        asked = Asked("", 1, (), budget, True)
        return page_html("image", "Image", asked, found=await found_by(image, 2 * PAGE))


def _add_errors(app: FastAPI) -> None:
    def answer(
        request: Request, status: int, reason: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        path = request.url.path
        if wants_page(request.scope):
            page = page_html("error", str(status), None, reason=reason)
            return HTMLResponse(page, status, headers)
        return JSONResponse(refusal(path, status, reason), status, headers)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if error.status_code == 405:
            headers["allow"] = ", ".join(methods_of(app)[request.url.path])
        return answer(request, error.status_code, str(error.detail), headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_arguments(request: Request, error: RequestValidationError) -> Response:
        said = [
            f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'body'}: {fault['msg']}"
            for fault in error.errors()
        ]
        return answer(request, 422, "; ".join(said) + ".")

    @app.exception_handler(InputError)
    async def refuse_input(request: Request, error: InputError) -> Response:
        return answer(request, 400, "This request cannot be used.")

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return answer(request, 500, "Something went wrong here; the log of the server has more.")


def _asked(ask: Callable[[], Answer]) -> Answer:
    """An answer of the service; what went wrong is logged and not told, it may name places."""
    try:
        return ask()
    except (InputError, RejectedRows):
        raise
    except VdrError as error:
        _log.exception("a request could not be answered")
        raise HTTPException(503, "The collection cannot be searched at the moment.") from error


def _choices(given: Sequence[str], service: SearchService) -> list[Choice]:
    try:
        return parse_choices(given, service.facets)
    except InputError as error:
        raise HTTPException(400, str(error)) from error


def _conditions(given: str | None) -> Mapping[str, Any] | None:
    """A filter out of its JSON."""
    if given is None:
        return None
    try:
        conditions = json.loads(given)
        parse_filter(conditions)
    except (ValueError, TypeError, RecursionError) as error:
        raise HTTPException(400, f"filter: {error}") from error
    return conditions  # type: ignore[no-any-return]


async def _refuse_unknown(request: Request) -> None:
    """Refuses a parameter of the API that it does not have: its sender means something by it."""
    if request.url.path.startswith("/api/"):
        known = [field.alias for field in request.scope["route"].dependant.query_params]
        unknown = [name for name in request.query_params if name not in known]
        if unknown:
            raise HTTPException(
                422,
                f"{unknown[0][:60]}: unknown parameter; there are {', '.join(known) or 'none'}.",
            )


def _explained(
    service: SearchService, query: str, id: str | None, kind: str
) -> Match | Explanation:
    if id is None:
        return _asked(lambda: service.explanation(query))
    candidates: list[int | str] = [id] if kind != "number" else []
    # Ids are integers of 64 bits; a longer run of digits is a text.
    if kind != "text" and id.isascii() and id.isdigit() and int(id) < 2**64:
        candidates.append(int(id))
    for candidate in candidates:
        try:
            match = _asked(lambda id=candidate: service.match(query, id))  # type: ignore[misc]
        except InputError as error:
            raise HTTPException(400, "This id is impossible.") from error
        if match is not None:
            return match
    raise HTTPException(404, "The collection holds no text with this id.")
