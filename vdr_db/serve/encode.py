"""Encoding over HTTP: `/embed_sparse` as text-embeddings-inference has it, and `/api/encode`.

Source of the first: the OpenAPI description of https://github.com/huggingface/text-embeddings-inference.
"""

# Annotations must be objects here, see `vdr_db.serve.app`.

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Literal

import orjson
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.concurrency import run_in_threadpool

from vdr_db.budget import Budget
from vdr_db.errors import InputError
from vdr_db.serve.batching import Side
from vdr_db.serve.service import SearchService
from vdr_db.sparse import SparseRows

__all__ = ["add_encoding", "pairs_of"]


class SparseValue(BaseModel):
    """A weight of a vector."""

    index: int = Field(description="token id")
    value: float


class EmbedSparseRequest(BaseModel):
    """A request of text-embeddings-inference."""

    inputs: str | list[str]
    truncate: bool | None = Field(
        None, description="false refuses texts that are longer than the model reads"
    )
    truncation_direction: Literal["Right", "right"] = "Right"
    prompt_name: Literal["query", "document"] | None = Field(
        None, description="which side the texts are of; documents unless it says query"
    )


class EncodeRequest(BaseModel):
    """Texts, or images, to be encoded."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] | None = None
    images: list[str] | None = Field(None, description="files of images in base64")
    side: Side = "document"

    @model_validator(mode="after")
    def _one_kind(self) -> "EncodeRequest":
        if (self.texts is None) == (self.images is None):
            raise ValueError("give exactly one of `texts` and `images`")
        return self


class Vector(BaseModel):
    """A sparse vector."""

    indices: list[int] = Field(description="token ids, ascending")
    values: list[float] = Field(description="float32 weights in their shortest digits")


class EncodeAnswer(BaseModel):
    """Vectors in the order of what was sent; an empty one has no weight at all."""

    vectors: list[Vector]


def add_encoding(
    app: FastAPI, service: SearchService, budget: Budget, decodes: asyncio.Semaphore
) -> None:
    """Adds both routes to an application; who decodes images holds `decodes`."""

    async def encoded(side: Side, texts: Sequence[str], *, cuts: bool = True) -> SparseRows:
        _check_count(len(texts), budget)
        longest = max(map(len, texts), default=0)
        if longest > budget.text_characters:
            most = budget.text_characters
            raise HTTPException(413, f"A text may have {most:,} characters, got {longest:,}.")
        try:
            if not cuts:
                await run_in_threadpool(service.refuse_long, side, texts)
            return await asyncio.wrap_future(service.encode(side, texts))
        except InputError as error:
            raise HTTPException(422, str(error)) from error

    @app.post("/embed_sparse", tags=["encode"], response_model=list[list[SparseValue]])
    async def embed_sparse(asked: EmbedSparseRequest) -> Response:
        """Sparse vectors of texts, as text-embeddings-inference answers."""
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        side = asked.prompt_name or "document"
        rows = await encoded(side, texts, cuts=asked.truncate is not False)
        return _json(b"[" + b",".join(map(pairs_of, rows)) + b"]")

    @app.post("/api/encode", tags=["encode"], response_model=EncodeAnswer)
    async def encode(asked: EncodeRequest) -> Response:
        """Sparse vectors of texts or images."""
        if asked.images is None:
            rows = await encoded(asked.side, asked.texts or [])
        else:
            _check_count(len(asked.images), budget)
            files = [_file(i, image, budget) for i, image in enumerate(asked.images)]
            async with decodes:
                try:
                    rows = await run_in_threadpool(service.encode_images, files)
                except InputError as error:
                    raise HTTPException(422, str(error)) from error
        vectors = [{"indices": row.indices, "values": row.values} for row in rows]
        return _json(orjson.dumps({"vectors": vectors}, option=orjson.OPT_SERIALIZE_NUMPY))


def _check_count(count: int, budget: Budget) -> None:
    if count == 0:
        raise HTTPException(422, "There is nothing to encode; send a text at least.")
    if count > budget.texts:
        raise HTTPException(413, f"A request may have {budget.texts:,} texts, got {count:,}.")


def _file(place: int, image: str, budget: Budget) -> bytes:
    try:
        content = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(422, f"images: {place} is no base64: {error}.") from error
    if len(content) > budget.upload_bytes:
        raise HTTPException(413, f"An image may have {budget.upload_bytes:,} bytes.")
    return content


def pairs_of(row: SparseRows) -> bytes:
    """One row as `/embed_sparse` writes it."""
    # NumPy's float32 are written with the fewest digits that give the same bits again.
    both = (
        orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
        for part in (row.indices, row.values)
    )
    pairs = (b'{"index":%b,"value":%b}' % pair for pair in zip(*both, strict=True) if pair[0])
    return b"[" + b",".join(pairs) + b"]"


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
