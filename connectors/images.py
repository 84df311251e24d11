"""Pictures in a collection: what `Collection.add_images` and `search_by_image` do.

Vectors of pictures and of texts are weights of the same tokens, so both lie in one collection,
under one vector, and any query finds either. What a document is stands in its payload: `"modality"`
is `"image"`, which a filter can ask for or leave out.

The encoder decodes and encodes; nothing here opens a picture.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vdr_db.connectors.base import EmptyRows, Id, Payload
from vdr_db.connectors.ids import checked_id, checked_ids
from vdr_db.errors import ConfigError, InputError, RejectedRows, ShapeError
from vdr_db.images.files import list_images
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors.collections.collection import Collection

__all__ = [
    "IMAGE",
    "IMAGE_KEY",
    "MODALITY_KEY",
    "THUMBNAIL_KEY",
    "EncodedImages",
    "add_images",
    "encode_query_image",
]

MODALITY_KEY = "modality"
"""Payload field that says what a document is."""

IMAGE = "image"
"""Its value for pictures."""

IMAGE_KEY = "image"
"""Payload field of the path of a picture that came as a path."""

THUMBNAIL_KEY = "thumbnail"
"""Payload field of a small copy of a picture, a `data:` address, where it was asked for."""

_IMAGE_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "vdr_db:image")


class EncodedImages(Protocol):
    """What `encode_images` of an encoder returns; `vdr_db.encoders.image.EncodedImages` is one."""

    @property
    def rows(self) -> SparseRows:
        """One row for each picture."""

    @property
    def names(self) -> Sequence[str]:
        """What each picture is called."""

    @property
    def digests(self) -> Sequence[str]:
        """SHA-256 (hex) of each picture's content, `""` of a refused one."""

    @property
    def refused(self) -> Mapping[int, str]:
        """Place of each picture without a vector → why."""

    @property
    def thumbnails(self) -> Sequence[str]:
        """A `data:` address of a small copy of each picture, where that was asked for."""


def add_images(
    collection: Collection,
    images: str | os.PathLike[str] | Iterable[Any],
    ids: Iterable[Id] | None,
    payloads: Iterable[Mapping[str, Any] | None] | None,
    *,
    batch_size: int,
    empty: EmptyRows,
    thumbnail_px: int | None = None,
) -> list[Id]:
    """Encodes and writes pictures, see `Collection.add_images`."""
    encode = _encode_images_of(collection, "add_images")
    if collection.documents == "tokens":
        raise ConfigError(
            "a collection of bags of tokens takes no images, which have no tokens; build one with "
            "documents='encoded'."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    sources, names = _sources(images)
    # Left out unless it is asked for: other encoders may not have it.
    options = {} if thumbnail_px is None else {"thumbnail_px": thumbnail_px}
    _check_alike(names if names is not None else images, ids, payloads)
    collection._create(collection.encoder.vocabulary.size)  # type: ignore[union-attr]
    written: list[Id] = []
    refused: dict[Id, str] = {}
    seen: dict[Id, int] = {}
    walks = (
        iter(sources),
        None if ids is None else iter(ids),
        None if payloads is None else iter(payloads),
    )
    for start, batch, given, beside in _batches(*walks, size=batch_size):
        called = [_name(image, start + i) for i, image in enumerate(batch)]
        known = None if names is None else names[start : start + len(batch)]
        whole = [_with_image(image, payload) for image, payload in zip(batch, beside, strict=True)]
        if given is not None:
            given = list(checked_ids(given, unique=True))
            _refuse_repeated(given, seen)
        encoded = encode(batch, **options)
        if thumbnail_px is not None:
            whole = _with_thumbnails(whole, encoded.thumbnails)
        reasons = {i: f"{called[i]}: {said}" for i, said in encoded.refused.items()}
        own = given or _ids_of(encoded.digests, called, known, reasons)
        fresh = _first_of_each(own, whole, seen) if given is None else list(range(len(batch)))
        refused.update({own[i]: reason for i, reason in reasons.items()})
        kept = [i for i in fresh if i not in reasons]
        skipped: set[Id] = set()
        if kept:
            rows = encoded.rows[np.array(kept, np.int64)]
            try:
                report = collection.store.upsert(
                    rows, [own[i] for i in kept], [whole[i] for i in kept], empty=empty
                )
                skipped.update(report.skipped)
            except RejectedRows as rejection:
                refused.update(zip(rejection.ids, rejection.reasons, strict=True))
        written += [id for id in own if id not in skipped]
    if refused:
        raise RejectedRows(list(refused), list(refused.values()))
    return written


def encode_query_image(collection: Collection, image: Any) -> SparseRows:
    """The vector of one picture as a query.

    Raises:
        InputError: It cannot be read.
    """
    encoded = _encode_images_of(collection, "search_by_image")([image])
    if encoded.refused:
        raise InputError(f"{encoded.names[0]} cannot be searched for: {encoded.refused[0]}.")
    return encoded.rows


def _encode_images_of(collection: Collection, what: str) -> Callable[..., EncodedImages]:
    found = getattr(collection.encoder, "encode_images", None)
    if found is None:
        has = "no encoder" if collection.encoder is None else type(collection.encoder).__name__
        raise ConfigError(
            f"`{what}` needs an encoder that reads images, got {has}; open the collection with a "
            "vdr_db.CrossModalEncoder."
        )
    return found  # type: ignore[no-any-return]


def _sources(images: Any) -> tuple[Iterable[Any], list[str] | None]:
    """Pictures, and the names of those of a folder."""
    if isinstance(images, (str, os.PathLike)):
        folder = Path(images)
        if not folder.is_dir():
            raise TypeError(
                f"`images` must be a folder or a list of images, got {os.fspath(images)!r}, which "
                "is no folder; pass [image]"
            )
        names = list_images(folder)
        return [str(folder / name) for name in names], names
    is_array = hasattr(images, "shape") and len(images.shape) < 4
    if is_array or not isinstance(images, Iterable) or isinstance(images, (bytes, Mapping)):
        raise TypeError(
            f"`images` must be a folder or a list of images, got one {type(images).__name__}; "
            "pass [image]"
        )
    return images, None


def _check_alike(images: Any, ids: Any, payloads: Any) -> None:
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"`ids` must be a sequence of ids, got {ids!r}; pass [{ids!r}]")
    if isinstance(payloads, Mapping):
        raise TypeError("`payloads` must be a sequence of mappings, got one; pass [payload]")
    named = (("images", images), ("ids", ids), ("payloads", payloads))
    sizes = {name: len(values) for name, values in named if hasattr(values, "__len__")}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ShapeError(f"images, ids and payloads must be equally many, got {told}.")


_Batch = tuple[int, list[Any], "list[Id] | None", list[Any]]


def _name(image: Any, place: int) -> str:
    return os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else f"image {place}"


def _batches(
    images: Iterator[Any],
    ids: Iterator[Id] | None,
    payloads: Iterator[Mapping[str, Any] | None] | None,
    *,
    size: int,
) -> Iterator[_Batch]:
    """Place of the first picture, pictures, ids and payloads."""
    done = 0
    while batch := list(islice(images, size)):
        given = None if ids is None else list(islice(ids, len(batch)))
        beside: list[Any] = (
            [None] * len(batch) if payloads is None else list(islice(payloads, len(batch)))
        )
        for name, values in (("ids", given), ("payloads", beside)):
            if values is not None and len(values) < len(batch):
                raise ShapeError(
                    f"`{name}` ended after {done + len(values)}, and there are more images; the "
                    f"first {done} images are written."
                )
        yield done, batch, given, beside
        done += len(batch)
    for name, rest in (("ids", ids), ("payloads", payloads)):
        if rest is not None and next(rest, rest) is not rest:
            raise ShapeError(f"`{name}` goes on after the {done} images, which are all written.")


def _with_image(image: Any, payload: Mapping[str, Any] | None) -> Payload:
    """The payload with what the document is, and where it came from if that is known."""
    if payload is not None and not isinstance(payload, Mapping):
        raise TypeError(f"payloads must be mappings, got {type(payload).__name__}: {payload!r}")
    joined = {} if payload is None else dict(payload)
    own = {MODALITY_KEY: IMAGE}
    if isinstance(image, (str, os.PathLike)):
        # A file name need not be text; the field is for people.
        own[IMAGE_KEY] = os.fsencode(image).decode("utf-8", "replace")
    for key, value in own.items():
        if joined.setdefault(key, value) != value:
            raise InputError(
                f"the payload has another value in {key!r}, which says what an image is or where "
                "it lies; rename that field."
            )
    return joined


def _with_thumbnails(payloads: Sequence[Payload], thumbnails: Sequence[str]) -> list[Payload]:
    """The payloads with small copies; one that has the field already keeps its own."""
    return [
        {THUMBNAIL_KEY: small, **payload} if small else payload
        for payload, small in zip(payloads, thumbnails, strict=True)
    ]


def _ids_of(
    digests: Sequence[str],
    called: Sequence[str],
    known: Sequence[str] | None,
    reasons: dict[int, str],
) -> list[Id]:
    """Ids of pictures that came without: paths within a folder, else made of the content.

    What has no content because it cannot be read goes by its name, and gets a reason if even that
    is unusable.
    """
    ids: list[Id] = []
    for i, digest in enumerate(digests):
        if known is None and digest:
            ids.append(str(uuid.uuid5(_IMAGE_IDS, digest)))
            continue
        name = called[i] if known is None else known[i]
        try:
            ids.append(checked_id(name))
        except InputError as error:
            shown = os.fsencode(name).decode("utf-8", "replace")
            reasons.setdefault(i, f"{shown}: its name is no usable id ({error})")
            ids.append(shown)
    return ids


def _refuse_repeated(ids: list[Id], seen: dict[Id, int]) -> None:
    for id in ids:
        if id in seen:
            raise InputError(
                f"every id of a call must be different, got {id!r} again in a later batch; "
                "earlier batches are written, add the later version in a call of its own."
            )
    seen.update(dict.fromkeys(ids, 0))


def _first_of_each(ids: list[Id], payloads: Sequence[Payload], seen: dict[Id, int]) -> list[int]:
    """Places of pictures not seen before; one seen with another payload is an error.

    Two files of equal content are one document, that of the first path.
    """
    fresh = []
    for i, (id, payload) in enumerate(zip(ids, payloads, strict=True)):
        told = hash(repr({key: payload[key] for key in payload if key != IMAGE_KEY}))
        if id not in seen:
            seen[id] = told
            fresh.append(i)
        elif seen[id] != told:
            raise InputError(
                "an image occurs twice in this call with different payloads, and without ids both "
                f"would be one document ({payload!r:.80}); pass ids."
            )
    return fresh
