"""Writing over HTTP, for applications that were asked to offer it."""

# Annotations must be objects here, see `vdr_db.serve.app`.

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from vdr_db.budget import Budget
from vdr_db.errors import InputError, RejectedRows
from vdr_db.serve.service import SearchService

__all__ = ["add_writing"]

DocumentId = StrictInt | StrictStr


class Document(BaseModel):
    """A text to be stored."""

    model_config = ConfigDict(extra="forbid")

    id: DocumentId
    text: str
    payload: dict[str, Any] = Field(default={}, description="kept beside it")


class Documents(BaseModel):
    """Texts to be stored."""

    model_config = ConfigDict(extra="forbid")

    documents: list[Document] = Field(min_length=1)


class Ids(BaseModel):
    """Ids of documents."""

    model_config = ConfigDict(extra="forbid")

    ids: list[DocumentId] = Field(min_length=1)


class RefusedDocument(BaseModel):
    """A document that could not be stored."""

    id: int | str
    reason: str


class WrittenAnswer(BaseModel):
    """What was stored, and what could not be."""

    ids: list[int | str] = Field(description="of what is stored")
    refused: list[RefusedDocument] = Field(default=[], description="all others are stored")


class DeletedAnswer(BaseModel):
    """How many documents went."""

    deleted: int


def add_writing(
    app: FastAPI,
    service: SearchService,
    budget: Budget,
    asked: Callable[[Callable[[], Any]], Any],
) -> None:
    """Adds the routes to an application; `asked` guards calls of the store."""

    @app.post("/documents", tags=["documents"])
    def write(given: Documents) -> WrittenAnswer:
        """Stores texts under their ids; what is there already is replaced."""
        documents = given.documents
        _check_count(len(documents), budget)
        if max(len(one.text) for one in documents) > budget.text_characters:
            raise HTTPException(413, f"A text may have {budget.text_characters:,} characters.")
        ids = [one.id for one in documents]
        texts, payloads = [one.text for one in documents], [one.payload for one in documents]
        try:
            made = asked(lambda: service.write(texts, ids, payloads))
        except RejectedRows as error:
            pairs = zip(error.ids, error.reasons, strict=True)
            refused = [RefusedDocument(id=id, reason=said) for id, said in pairs]
            kept = [id for id in ids if id not in error.ids]
            return WrittenAnswer(ids=kept, refused=refused)
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        return WrittenAnswer(ids=made)

    @app.delete("/documents", tags=["documents"])
    def delete(given: Ids) -> DeletedAnswer:
        """Removes documents; ids that are not there are passed over."""
        _check_count(len(given.ids), budget)
        try:
            return DeletedAnswer(deleted=asked(lambda: service.delete(given.ids)))
        except InputError as error:
            raise HTTPException(422, str(error)) from error


def _check_count(count: int, budget: Budget) -> None:
    if count > budget.texts:
        raise HTTPException(413, f"A request may have {budget.texts:,} documents, got {count:,}.")
