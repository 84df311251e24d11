"""Images of a folder as the source of an ingest.

An image is a record without a text: its id is its path within the folder, what is encoded is the
file, and the fingerprint is made of the file's bytes. Files are opened when they are encoded, not
before, and one that cannot be read goes to the quarantine alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from vdr_db.connectors.base import Documents
from vdr_db.connectors.encoder import Encoder, ImageReader
from vdr_db.connectors.images import IMAGE, IMAGE_KEY, MODALITY_KEY, EncodeImages
from vdr_db.digest import file_digest
from vdr_db.errors import ConfigError, InputError
from vdr_db.images.files import IMAGE_SUFFIXES, walk_images
from vdr_db.ingest.identity import HASHED_BYTES
from vdr_db.ingest.ledger import Ranges
from vdr_db.ingest.source import Block, Slice, Window, cut_windows
from vdr_db.readers import Record

__all__ = ["ImageFolderSource", "encoding_of", "image_digest"]

_FIRST_WINDOW = 32  # images; they take longer than texts, and Ctrl-C waits for a window


class ImageFolderSource:
    """The images in a folder and below, in the order of their paths.

    What is an image is decided by the name, as in `vdr_db.images.files.list_images`, and the order
    is the same; but only one folder's names are held at a time.

    Args:
        folder: The folder.
        slice: The part of this worker: image i for k = i mod n.
        thumbnail_px: Longest side of a small copy to keep beside each vector; `None` keeps none.
        digest: Know files in the ledger by SHA-256 of their contents alone, however large they
            are; see `vdr_db.ingest.identity`.

    Raises:
        InputError: It is no folder, cannot be read, or holds no image.
    """

    has_texts = False
    is_rereadable = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        slice: Slice | None = None,
        thumbnail_px: int | None = None,
        digest: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.slice = slice or Slice()
        self.thumbnail_px = thumbnail_px
        self._digest = digest
        if next(walk_images(folder), None) is None:
            raise InputError(
                f"{self.folder} must hold images (files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}), got none."
            )

    @cached_property
    def description(self) -> Mapping[str, Any] | None:
        """What identifies the images in a ledger; they are read for it."""
        return {
            "images": self._identity(),
            "place": os.path.abspath(self.folder),
            "thumbnail_px": self.thumbnail_px,
            "slice": str(self.slice),
        }

    def _identity(self) -> dict[str, Any]:
        """Number of the images, and hashes of what tells each from another or a changed one."""
        told, contents = hashlib.sha256(), hashlib.sha256()
        count = size = 0
        is_hashed = True
        for name in walk_images(self.folder):
            facts: list[Any] = [name]
            path = self.folder / name
            with suppress(OSError):  # it is refused when its turn comes
                status = os.stat(path)
                size += status.st_size
                is_hashed = self._digest or size <= HASHED_BYTES
                content = image_digest(path) if is_hashed else ""
                contents.update(json.dumps([name, content]).encode() + b"\n")
                facts += [status.st_size, content if self._digest else status.st_mtime_ns]
            told.update(json.dumps(facts).encode() + b"\n")
            count += 1
        identity: dict[str, Any] = {"count": count, "sha256": told.hexdigest()}
        return {**identity, "content": contents.hexdigest()} if is_hashed else identity

    def records(self) -> Iterator[Record]:
        """The images of this slice; their `source` is the path, nothing is opened."""
        for name in islice(walk_images(self.folder), self.slice.k, None, self.slice.n):
            path = str(self.folder / name)
            # A file name need not be text; the field is for people.
            shown = os.fsencode(path).decode("utf-8", "replace")
            yield Record(name, "", {MODALITY_KEY: IMAGE, IMAGE_KEY: shown}, path)

    def blocks(self, settled: Ranges, window: Window) -> Iterator[Block]:
        """Windows of the images that are not settled; see `Source`."""
        window.documents = min(window.documents, _FIRST_WINDOW)
        return cut_windows(self.records(), settled, window)

    def encoding(self, encoder: Encoder | ImageReader | None) -> EncodeImages:
        """How an encoder reads these images; a `ConfigError` if it reads none."""
        encode: EncodeImages | None = getattr(encoder, "encode_images", None)
        if encode is None:
            has = "no encoder" if encoder is None else type(encoder).__name__
            raise ConfigError(
                f"images need an encoder that reads images, got {has}; use a "
                "vdr_db.CrossModalEncoder or ImageEncoder."
            )
        # Left out unless it is asked for: other encoders may not have it.
        px = self.thumbnail_px
        return encode if px is None else partial(encode, thumbnail_px=px)


def encoding_of(
    source: object, encoder: Encoder | ImageReader | None, documents: Documents
) -> EncodeImages | None:
    """How the images of a source are encoded; `None` for a source of anything else.

    Raises `ConfigError` where the encoder reads no images, or bags of tokens are asked for.
    """
    encoding = getattr(source, "encoding", None)
    if encoding is not None and documents == "tokens":
        raise ConfigError(
            "a collection of bags of tokens takes no images, which have no tokens; build one with "
            "documents='encoded'."
        )
    return None if encoding is None else encoding(encoder)


def image_digest(path: str | os.PathLike[str]) -> str:
    """`file_digest` of an image; `""` when it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""  # reading a pipe may wait for ever
        return file_digest(path)
    except (OSError, ValueError):  # a zero byte in a path is a ValueError
        return ""
