"""Haystack: components that make the sparse embedding of a query, and those of documents.

`docs/integrations.md` has an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vdr_db.connectors.collections.encoding import Encoder, Mode
from vdr_db.errors import ConfigError, require
from vdr_db.integrations.sides import TextSides, checked_mode, id_weight_lists
from vdr_db.sparse import SparseRows

require("haystack", "haystack")

from haystack import Document, component, default_to_dict  # noqa: E402
from haystack.dataclasses import SparseEmbedding  # noqa: E402

__all__ = ["VDRSparseDocumentEmbedder", "VDRSparseTextEmbedder"]


class _Loader:
    """What both components share: an encoder that is given, or is loaded when it is needed."""

    def __init__(
        self,
        model: str | None,
        options: Mapping[str, Any] | None,
        mode: Mode,
        encoder: Encoder | None,
    ) -> None:
        if (model is None) == (encoder is None):
            raise ConfigError(
                "give exactly one of `model`, a folder or a name on the hub, and `encoder`."
            )
        if encoder is not None and options:
            raise ConfigError("`options` are for loading a `model`; the encoder is loaded already.")
        self.model = model
        self.options = dict(options or {})
        self.mode = checked_mode(mode)
        self.encoder = encoder
        self._sides = None if encoder is None else TextSides(encoder, mode=mode)

    def warm_up(self) -> None:
        """Loads the model, once."""
        self._ready()

    def _ready(self) -> TextSides:
        if self._sides is None:
            from vdr_db import SparseEncoder

            self.encoder = SparseEncoder.from_pretrained(self.model or "", **self.options)
            self._sides = TextSides(self.encoder, mode=self.mode)
        return self._sides

    def to_dict(self) -> dict[str, Any]:
        """The component for a saved pipeline.

        Raises:
            ConfigError: It was made of an encoder object.
        """
        if self.model is None:
            raise ConfigError(
                f"a {type(self).__name__} made of an encoder object cannot be saved; make it with "
                "`model`, a folder or a name on the hub."
            )
        saved: dict[str, Any] = default_to_dict(
            self, model=self.model, options=self.options, mode=self.mode, **self._own_settings()
        )
        return saved

    def _own_settings(self) -> dict[str, Any]:
        return {}


@component
class VDRSparseTextEmbedder(_Loader):
    """The sparse embedding of a query.

    Args:
        model: A folder, or a name on the hub; loaded by `warm_up` or the first `run`.
        options: More arguments of `SparseEncoder.from_pretrained`, in types that YAML knows.
        mode: `"alpha"` asks with bags of tokens; see `Mode`.
        encoder: A ready encoder instead of `model`. Such a component cannot be saved.

    Raises:
        ConfigError: Not exactly one of `model` and `encoder` is given, or the mode is unknown.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        options: dict[str, Any] | None = None,
        mode: Mode = "full",
        encoder: Encoder | None = None,
    ) -> None:
        # `component` makes another class of this one, so a bare `super()` finds no way up.
        _Loader.__init__(self, model, options, mode, encoder)

    @component.output_types(sparse_embedding=SparseEmbedding)  # type: ignore[untyped-decorator]
    def run(self, text: str) -> dict[str, SparseEmbedding]:
        """Makes the embedding of a query: `{"sparse_embedding": ...}`.

        Raises:
            TypeError: Something other than one text came.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"`text` must be one string, got {type(text).__name__}; for documents use "
                "VDRSparseDocumentEmbedder"
            )
        (embedding,) = _embeddings(self._ready().query_rows([text]))
        return {"sparse_embedding": embedding}


@component
class VDRSparseDocumentEmbedder(_Loader):
    """Documents with their sparse embeddings.

    Args:
        model: As `options`, `encoder` and the errors, see `VDRSparseTextEmbedder`.
        options: For loading it.
        mode: `"beta"` stores bags of tokens; see `Mode`.
        meta_fields_to_embed: Metadata fields whose values go before the text.
        embedding_separator: What stands between those values and the text.
        encoder: A ready one.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        options: dict[str, Any] | None = None,
        mode: Mode = "full",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        encoder: Encoder | None = None,
    ) -> None:
        # `component` makes another class of this one, so a bare `super()` finds no way up.
        _Loader.__init__(self, model, options, mode, encoder)
        if isinstance(meta_fields_to_embed, str):
            raise TypeError(
                f"`meta_fields_to_embed` must be a list of names; pass [{meta_fields_to_embed!r}]"
            )
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator

    @component.output_types(documents=list[Document])  # type: ignore[untyped-decorator]
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Makes `{"documents": ...}`, copies with embeddings in the same order.

        Documents without a text get the embedding of their metadata, or none.

        Raises:
            TypeError: Something other than a list of documents came.
        """
        if not isinstance(documents, list) or not all(
            isinstance(document, Document) for document in documents
        ):
            raise TypeError(
                "`documents` must be a list of haystack Documents; for a text use "
                "VDRSparseTextEmbedder"
            )
        texts = [self._text(document) for document in documents]
        rows = self._ready().document_rows(texts)
        pairs = zip(documents, _embeddings(rows), strict=True)
        return {"documents": [replace(one, sparse_embedding=made) for one, made in pairs]}

    def _own_settings(self) -> dict[str, Any]:
        return {
            "meta_fields_to_embed": self.meta_fields_to_embed,
            "embedding_separator": self.embedding_separator,
        }

    def _text(self, document: Document) -> str:
        values = (document.meta.get(name) for name in self.meta_fields_to_embed)
        parts = [str(value) for value in values if value is not None]
        return self.embedding_separator.join([*parts, document.content or ""])


def _embeddings(rows: SparseRows) -> Sequence[SparseEmbedding]:
    return [SparseEmbedding(indices=ids, values=weights) for ids, weights in id_weight_lists(rows)]
