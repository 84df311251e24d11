"""What a collection needs of an encoder, and how queries and documents are represented."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

from vdr_db.checkpoints.assets import DEFAULT_MODEL, fetch, is_known
from vdr_db.connectors.base import Documents, Store
from vdr_db.connectors.encoder import Encoder
from vdr_db.connectors.images import EncodedImages, EncodeImages
from vdr_db.connectors.passages import PassageRows, Passages, encode_passages
from vdr_db.connectors.probes import ProbedSide, check_probes, with_probes
from vdr_db.errors import ConfigError
from vdr_db.forks import renew_after_fork
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder

__all__ = [
    "AnyEncoder",
    "Encoder",
    "Encoding",
    "Mode",
    "TextOptions",
    "checked_mode",
    "has_images",
    "load_encoder",
]

Mode: TypeAlias = Literal["full", "alpha", "beta"]
"""How query and documents are represented.

| mode  | query            | documents        | model is needed            |
|-------|------------------|------------------|----------------------------|
| full  | encoded          | encoded          | for queries and documents  |
| alpha | bag of tokens    | encoded          | for documents only         |
| beta  | encoded          | bags of tokens   | for queries only           |
"""


class TextOptions(TypedDict, total=False):
    """How a collection keeps documents; see `Collection`."""

    documents: Documents | None
    store_text: bool
    text_key: str


AnyEncoder: TypeAlias = Encoder | str | os.PathLike[str]
"""An encoder, or the name or folder of a model."""


class Encoding:
    """An encoder as a collection uses it: loaded when first needed, one call at a time.

    Of a model that is named, the part of images is loaded when an image comes.

    Args:
        encoder: An encoder, or the name or folder of a model.
        default: Where `encoder` is `None`, use the model of `$VDR_DB_MODEL`, else the shipped one,
            for what needs a model.
        check: Called when a model was loaded, before it is used.
        store: Compared with what the encoder makes when a side of it is first used.

    Attributes:
        turn: Whoever has it may use the encoder.
    """

    def __init__(
        self,
        encoder: AnyEncoder | None,
        *,
        default: bool = False,
        check: Callable[[], None] | None = None,
        store: Store | None = None,
    ) -> None:
        self._store = store
        self._probed: set[ProbedSide] = set()
        self._name: str | None = None
        self._encoder: Encoder | None = None
        self._is_default = encoder is None and default
        if self._is_default:
            self._name = os.environ.get("VDR_DB_MODEL") or DEFAULT_MODEL
        elif isinstance(encoder, (str, os.PathLike)):
            self._name = os.fspath(encoder)
        else:
            self._encoder = encoder
        self._check = check
        self._stamp: EncoderStamp | None = None
        self.turn = threading.RLock()
        renew_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "turn": None}  # a lock is of one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, turn=threading.RLock())
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A turn that a thread of the parent had never ends here."""
        self.turn = threading.RLock()

    @property
    def model(self) -> str:
        """Name of the model, for messages."""
        if self._encoder is None:
            return self._name or "no encoder"
        kept = None if self._stamp is None else self._stamp.model
        return getattr(self._encoder, "model", None) or kept or type(self._encoder).__name__

    @property
    def named(self) -> Encoder | None:
        """The encoder that the caller gave or named, or that is loaded already; see `get`."""
        return self._encoder if self._is_default else self.get()

    @property
    def width(self) -> int | None:
        """Size of its vocabulary, `None` while it is not loaded."""
        return None if self._encoder is None else self._encoder.vocabulary.size

    def get(self) -> Encoder | None:
        """The encoder, loaded now where it is only named; errors as in `load_encoder`."""
        with self.turn:
            if self._encoder is None and self._name is not None:
                stored = None if self._store is None else self._store.stamp
                # Stamps of earlier versions hold both parts in one.
                is_one = stored is not None and stored.reads_images and stored.image is None
                self._take(load_encoder(self._name, images=is_one))
            return self._encoder

    def with_images(self) -> Encoder | None:
        """The encoder with its part of images, loaded now where it is only named."""
        with self.turn:
            encoder = self.get()
            if encoder is None or self._name is None or hasattr(encoder, "encode_images"):
                return encoder
            both = _with_images(encoder, self._name)
            if both is not encoder:
                self._take(both)
            return both

    def use(self, encoder: Encoder) -> None:
        """Uses another encoder from now on, unless the check refuses it."""
        with self.turn:
            self._take(encoder)
            self._name, self._is_default = None, False
            self._probed.clear()

    def _take(self, encoder: Encoder) -> None:
        """Uses an encoder that was loaded, unless the check refuses it."""
        before = self._encoder, self._stamp
        self._encoder, self._stamp = encoder, None
        try:
            if self._check is not None:
                self._check()
        except BaseException:
            self._encoder, self._stamp = before
            raise

    def need(self, what: str) -> Encoder:
        """The encoder, for texts; a `ConfigError` if there is none or it reads images only."""
        encoder = self.get()
        if encoder is None:
            raise ConfigError(
                f"`{what}` with texts needs an encoder; open the collection with encoder=..., or "
                "use SparseRows."
            )
        if not hasattr(encoder, "encode_queries"):
            raise ConfigError(
                f"`{what}` with texts needs an encoder that reads texts, got "
                f"{type(encoder).__name__}; open the collection with a vdr_db.CrossModalEncoder."
            )
        return encoder

    def stamp(self) -> EncoderStamp | None:
        """Identity of the encoder, kept because it may cost a pass over the weights."""
        if self._stamp is None and self._encoder is not None:
            self._stamp = self._encoder.stamp()
        return self._stamp

    def new_stamp(self) -> EncoderStamp | None:
        """The same with what the encoder makes of a few texts, for a store that is made now."""
        return with_probes(self._encoder, self.stamp())

    def _probe(self, side: ProbedSide, encoder: Encoder) -> None:
        if side not in self._probed and self._store is not None:
            check_probes(encoder, self._store.stamp, side, repr(self._store))
            self._probed.add(side)

    def queries(self, queries: str | Sequence[str] | SparseRows, mode: Mode) -> SparseRows:
        """Queries as rows; rows stay as they are. A query that is neither is a `TypeError`."""
        if isinstance(queries, SparseRows):
            return queries
        encoder = self.need("search")
        given: Any = queries
        if isinstance(given, (bytes, bytearray)):
            raise TypeError("queries must be strings, got bytes; decode them: query.decode()")
        texts = [queries] if isinstance(queries, str) else queries
        if not isinstance(texts, Sequence):
            raise TypeError(f"queries must be strings or SparseRows, got {type(texts).__name__}")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"queries must be strings, got {type(text).__name__}: {text!r}")
        with self.turn:
            if mode == "alpha":
                return encoder.bag_of_tokens(texts, side="query")
            self._probe("query", encoder)
            return encoder.encode_queries(texts)

    def documents(self, texts: Sequence[str], documents: Documents = "encoded") -> SparseRows:
        """Documents as rows."""
        encoder = self.need("add_texts")
        with self.turn:
            if documents == "tokens":
                return encoder.bag_of_tokens(texts)
            self._probe("document", encoder)
            return encoder.encode_documents(texts)

    def passages(
        self, texts: Sequence[str], documents: Documents, passages: Passages | None
    ) -> SparseRows | PassageRows:
        """Documents as rows of their passages; without `passages` as one row each."""
        if passages is None:
            return self.documents(texts, documents)
        encode = partial(self.documents, documents=documents)
        return encode_passages(encode, self.need("add_texts"), texts, passages)

    def images(self, what: str) -> EncodeImages:
        """`encode_images` of the encoder, one call at a time; a `ConfigError` without one."""
        encoder = self.with_images()
        encode: EncodeImages | None = getattr(encoder, "encode_images", None)
        if encode is None:
            has = "no encoder" if encoder is None else type(encoder).__name__
            raise ConfigError(
                f"`{what}` needs an encoder that reads images, got {has}; open the collection with "
                f"encoder={DEFAULT_MODEL!r} or another vdr_db.CrossModalEncoder."
            )

        def in_turn(images: Any, **options: int) -> EncodedImages:
            with self.turn:
                return encode(images, **options)

        return in_turn

    def token(self, token_id: int) -> str:
        """Text of a token, its id where there is no encoder."""
        encoder = self.named
        return str(token_id) if encoder is None else encoder.vocabulary.token(token_id)


def load_encoder(encoder: AnyEncoder, *, images: bool = False) -> Encoder:
    """The model of a name or folder, of texts or with `images` of both; an encoder as it is.

    Raises:
        ConfigError: It cannot be found or is damaged.
        MissingExtraError: A package that it needs is not installed.
    """
    if not isinstance(encoder, (str, os.PathLike)):
        return encoder
    from vdr_db.encoders.text import SparseEncoder

    text = SparseEncoder.from_pretrained(encoder)
    return _with_images(text, os.fspath(encoder)) if images else text


def has_images(name: str) -> bool:
    """Whether the model of a name or folder holds an encoder of images beside that of texts."""
    from vdr_db.checkpoints.layouts import CROSS_MODAL_FILE

    folder = Path(name)
    if is_known(name) and not folder.is_dir():
        folder = fetch(name)
    return (folder / CROSS_MODAL_FILE).is_file()


def _with_images(text: Encoder, name: str) -> Encoder:
    """The encoder of texts of a model with that of images beside it, where the model has one."""
    if not has_images(name):
        return text
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.image import ImageEncoder

    return CrossModalEncoder(cast("SparseEncoder", text), ImageEncoder.from_pretrained(name))


def checked_mode(mode: Mode | None, documents: Documents) -> Mode:
    """The mode of a search, `None` for what is usual with such documents.

    Raises:
        ConfigError: The mode does not fit the documents.
    """
    usual: Mode = "beta" if documents == "tokens" else "full"
    mode = usual if mode is None else mode
    if mode not in ("full", "alpha", "beta"):
        raise ConfigError(f"`mode` must be 'full', 'alpha' or 'beta', got {mode!r}.")
    if (mode == "beta") != (documents == "tokens"):
        held = "bags of tokens" if documents == "tokens" else "encoded documents"
        raise ConfigError(
            f"mode {mode!r} cannot be searched in a collection of {held}; "
            f"use mode {usual!r}, or build a collection with another `documents`."
        )
    return mode
