"""`CrossModalEncoder`: a text encoder and an image encoder whose vectors can be compared.

Both compute weights of the same token ids, so a text finds images and an image finds texts in
one collection, by the words they share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.folders import settings_of, written_folder
from vdr_db.checkpoints.graphs import Runtime
from vdr_db.checkpoints.layouts import CROSS_MODAL_FILE, IMAGE_PART, TEXT_PART
from vdr_db.checkpoints.locate import locate_model
from vdr_db.checkpoints.plan import Compatibility, FromCheckpoint, Padding, compatibility_of
from vdr_db.checkpoints.precision import checked_precision
from vdr_db.encoders.image import MAX_PIXELS, EncodedImages, ImageEncoder, ImageSource
from vdr_db.encoders.text import Side, SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.kernels import Backend
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp
from vdr_db.text.passages import Span
from vdr_db.text.tokenization import AnyTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.interface import Precision

if TYPE_CHECKING:
    import torch

__all__ = ["CrossModalEncoder"]

CROSS_MODAL_FORMAT = 1
PARTS_COMPARED = 32  # of the two matrices, one after the other: a copy of both would be large


class CrossModalEncoder:
    """Texts and images to vectors of one space.

    Attributes:
        text: Encoder of texts.
        image: Encoder of images.
        model: Name or folder it came from.
        revision: Revision on the hub.
    """

    def __init__(
        self, text: SparseEncoder, image: ImageEncoder, *, model: str = "", revision: str = ""
    ) -> None:
        """Puts two encoders together; `from_pretrained` is the usual way.

        Args:
            text: Encoder of texts.
            image: Encoder of images, trained together with it.
            model: Name for the stamp.
            revision: Revision for the stamp.

        Raises:
            ConfigError: The two do not have the same tokens.
        """
        one, other = text.vocabulary, image.vocabulary
        if (one.fingerprint, one.kind) != (other.fingerprint, other.kind):
            raise ConfigError(
                "text and image encoder must have the same tokens and columns, got "
                f"{one!r} and {other!r}; their vectors cannot be compared."
            )
        self.text = text
        self.image = image
        self.model = model or text.model
        self.revision = revision

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        dtype: str | torch.dtype | None = None,
        k: int | FromCheckpoint | None = "checkpoint",
        image_k: int | FromCheckpoint | None = "checkpoint",
        max_length: int | None = None,
        lexical: bool | None = None,
        compatibility: Compatibility | Padding | None = None,
        backend: Backend = "auto",
        tokenizer: AnyTokenizer | None = None,
        revision: str | None = None,
        runtime: Runtime = "auto",
        threads: int | None = None,
        pool_padding: Padding | bool | None = None,
    ) -> CrossModalEncoder:
        """Both encoders out of a model folder or from the hub.

        Reads VDR's published cross-modal checkpoints, which hold a text and an image encoder, and
        folders of this library.

        Args:
            name_or_folder: A folder, else the id of a model on the hub.
            device: Where to compute; None for CUDA if there is one, else the CPU.
            precision: As in `SparseEncoder.from_pretrained`; images stay in float32 unless
                torch computes.
            dtype: The same.
            k: Dimensions kept of each text and image; None keeps all.
            image_k: The same for images only; left alone, it follows `k` where that is given.
            max_length: Most tokens of a text, special tokens included.
            lexical: Whether a text's own tokens are kept in addition to the k largest.
            compatibility: As in `SparseEncoder.from_pretrained`; the published numbers of
                cross-modal checkpoints were made with `"max_length"`.
            backend: Of the kernels.
            tokenizer: A tokenizer or a folder with one, for folders that hold none.
            revision: Branch, tag or commit on the hub.
            runtime: As in `SparseEncoder.from_pretrained`.
            threads: Of graphs; None for one a core.
            pool_padding: Older name of `compatibility`.

        Raises:
            ConfigError: The folder, a file in it, or an option is impossible, or one of the two
                encoders is missing.
            MissingExtraError: A package of the extra `torch` is not installed.
        """
        padding = compatibility_of(compatibility, pool_padding, None)
        precision, dtype = checked_precision(precision, dtype)
        folder, found = locate_model(name_or_folder, revision)
        file = folder / CROSS_MODAL_FILE
        if file.is_file() and settings_of(file).get("format") != CROSS_MODAL_FORMAT:
            raise ConfigError(
                f"{file} must have format {CROSS_MODAL_FORMAT}, got "
                f"{settings_of(file).get('format')!r}; install the version of vdr-db that wrote it."
            )
        text = SparseEncoder.from_pretrained(
            folder,
            device=device,
            precision=precision,
            dtype=None if precision == "bfloat16" else dtype,
            k=k,
            max_length=max_length,
            lexical=lexical,
            compatibility=padding,
            backend=backend,
            tokenizer=tokenizer,
            runtime=runtime,
            threads=threads,
        )
        image = ImageEncoder.from_pretrained(
            folder,
            device=device,
            dtype=text.dtype if precision == "bfloat16" else dtype,  # graphs have float32
            k=k if image_k == "checkpoint" else image_k,
            backend=backend,
            tokenizer=tokenizer,
            runtime=runtime,
            threads=threads,
        )
        text.model = image.model = os.fspath(name_or_folder)
        return cls(text, image, model=text.model, revision=found)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes both encoders as a folder that `from_pretrained` reads; all of it or nothing.

        `SparseEncoder.from_pretrained` and `ImageEncoder.from_pretrained` read their part of it. A
        projection of images that is the matrix of the text encoder is written once.

        Args:
            folder: Where to. A cross-modal encoder saved there before is replaced; anything else is
                left alone.

        Raises:
            ConfigError: The place holds something else, or cannot be written.
        """
        from vdr_db.checkpoints.image import ImageParts, save_image

        with written_folder(folder, CROSS_MODAL_FILE) as fresh:
            self.text.save_pretrained(fresh / TEXT_PART)
            save_image(self.image._parts(ImageParts), fresh / IMAGE_PART, own=self._own_columns())
            content = json.dumps({"format": CROSS_MODAL_FORMAT}) + "\n"
            (fresh / CROSS_MODAL_FILE).write_text(content, "utf-8")

    @property
    def is_tied(self) -> bool:
        """Whether images are projected by the matrix of texts, or by a quarter of its rows."""
        return self._own_columns() is not None

    def _own_columns(self) -> npt.NDArray[np.int64] | None:
        """Columns whose rows images do not share with texts; None for three quarters or more."""
        parts = np.array_split(np.arange(self.vocabulary.columns), PARTS_COMPARED)
        text, image = self.text.tower("document"), self.image._main_tower
        own: list[npt.NDArray[np.int64]] = []
        for part in parts:
            theirs, ours = text.plain_rows(part), image.rows(part)
            if theirs.shape != ours.shape:
                return None
            own.append(part[(theirs != ours).any(axis=1)])
        found = np.concatenate(own)
        return found if 4 * found.size < 3 * self.vocabulary.columns else None

    @property
    def vocabulary(self) -> Vocabulary:
        """Column, id and text of every token, of both sides."""
        return self.text.vocabulary

    @property
    def truncated(self) -> int:
        """How many texts were cut to the maximal length so far."""
        return self.text.truncated

    def stamp(self) -> EncoderStamp:
        """Identity of both encoders together, for stores."""
        text, image = self.text.stamp(), self.image.stamp()
        return replace(text, model=self.model, revision=self.revision, image=image)

    def __repr__(self) -> str:
        """Both encoders."""
        return f"CrossModalEncoder({self.text!r}, {self.image!r})"

    def encode_documents(self, texts: Iterable[str], **options: Any) -> SparseRows:
        """Vectors of texts, see `SparseEncoder.encode_documents`."""
        return self.text.encode_documents(texts, **options)

    def encode_queries(self, texts: Iterable[str], **options: Any) -> SparseRows:
        """Vectors of queries, see `SparseEncoder.encode_queries`."""
        return self.text.encode_queries(texts, **options)

    def bag_of_tokens(self, texts: Iterable[str], side: Side = "document") -> SparseRows:
        """Tokens of each text, see `SparseEncoder.bag_of_tokens`; the model is not run."""
        return self.text.bag_of_tokens(texts, side)

    def cut_passages(self, texts: Sequence[str], *, tokens: int, overlap: int) -> list[list[Span]]:
        """Where texts are cut into passages, see `SparseEncoder.cut_passages`."""
        return self.text.cut_passages(texts, tokens=tokens, overlap=overlap)

    def token_ids(self, text: str) -> list[int]:
        """Own token ids of one text, uncut and without special tokens."""
        return self.text.token_ids(text)

    def encode_images(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        thumbnail_px: int | None = None,
        show_progress: bool = False,
    ) -> EncodedImages:
        """Vectors of images, see `ImageEncoder.encode_images`."""
        return self.image.encode_images(
            images,
            batch_size=batch_size,
            threads=threads,
            max_pixels=max_pixels,
            thumbnail_px=thumbnail_px,
            show_progress=show_progress,
        )
