"""`ImageEncoder`: images to sparse vectors over token ids.

    images -> pixels [B, 3, S, S] -> states of patches [B, P, H] -> pooled scores [B, V]
    -> `SparseRows`

An image becomes weights over words: the vectors are of the same kind as those of texts, so stores,
searches and explanations are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vdr_db.budget import BUDGET, Budget
from vdr_db.checkpoints.folders import understood
from vdr_db.checkpoints.graphs import Runtime, trainable
from vdr_db.checkpoints.plan import FromCheckpoint
from vdr_db.checkpoints.tokenizers import tokenizer_of
from vdr_db.checkpoints.weights import Weight
from vdr_db.counts import counted
from vdr_db.encoders.base import Encoder, positive, progress
from vdr_db.encoders.encoded_images import EncodedImages
from vdr_db.encoders.rows import row_of, scaled
from vdr_db.errors import ConfigError, require
from vdr_db.images.batches import PreparedImage, image_batches, named_images, prepared_images
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.images.reading import ImageSource, check_kind, read_image
from vdr_db.images.thumbnails import checked_thumbnail_px
from vdr_db.kernels import Activation, Backend
from vdr_db.kernels.plain import activate, norm_of
from vdr_db.sparse import SparseRows
from vdr_db.text.tokenization import AnyTokenizer, TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.interface import FloatArray
from vdr_db.towers.onnx import OnnxImageTower

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vdr_db.towers.image import ImageTower

__all__ = ["EncodedImages", "ImageEncoder", "ImageSource"]

BATCH_SIZE = {"cpu": 16}
"""Images in a batch, by device type."""
BATCH_SIZE_ELSEWHERE = 128

MAX_PIXELS = BUDGET.image_pixels


class ImageEncoder(Encoder):
    """Images to sparse vectors.

    Get one with `ImageEncoder.from_pretrained`, or start a new one from a vision model with
    `ImageEncoder.from_vision_model`. With the `vit` body an image's vector depends on that image
    alone: its bits are the same in any batch on one device, dtype and backend on the CPU. On a GPU,
    and with bodies of `transformers`, that holds up to rounding.

    Attributes:
        tokenizer: Whose tokens the columns are.
        vocabulary: Column, id and text of every token.
        preprocessing: How images become pixels.
        activation: Turns scores into weights.
        k: Dimensions kept of each image, or None for all.
        norm: Whether vectors have L2 norm 1 before selection.
        scale: What weights are multiplied with after that; None for nothing.
        backend: Of the kernels.
        model: Name or folder it came from.
        revision: Revision on the hub.
    """

    def __init__(
        self,
        *,
        tower: ImageTower | OnnxImageTower,
        tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        preprocessing: Preprocessing,
        activation: Activation = "elu1p",
        k: int | None = None,
        norm: bool = True,
        scale: float | None = None,
        backend: Backend = "auto",
        model: str = "",
        revision: str = "",
        digest: str = "",
    ) -> None:
        """Puts an encoder together; `from_pretrained` is the usual way.

        Args:
            tower: Body and head.
            tokenizer: Whose tokens the columns are; saved with the encoder.
            vocabulary: Of the head.
            preprocessing: How images become pixels.
            activation: Turns scores into weights.
            k: Dimensions kept of each image; None for all.
            norm: Scale each vector to L2 norm 1 before selection.
            scale: Multiply weights after that, so that images score as texts beside them do.
            backend: Of the kernels.
            model: Name for the stamp.
            revision: Revision for the stamp.
            digest: Of the weights, where it is known; else they are read when it is asked for.

        Raises:
            ConfigError: The parts do not fit together, or an option is impossible.
        """
        columns = vocabulary.columns
        if tower.columns != columns:
            raise ConfigError(
                f"the projection must have a row for each of the {columns} columns, got "
                f"{tower.columns}; model and tokenizer do not belong together."
            )
        if preprocessing.size != tower.config.image_size:
            raise ConfigError(
                f"the preprocessing must make images of {tower.config.image_size} pixels, which "
                f"the model reads, got {preprocessing.size}."
            )
        super().__init__(
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            activation=activation,
            norm=norm,
            backend=backend,
            model=model,
            revision=revision,
        )
        k = None if k is None else counted("k", k)
        if k is not None and k > columns:
            raise ConfigError(
                f"`k` must be None or an integer in [1, {columns}], got {k!r}; the model computes "
                "that many dimensions."
            )
        self._tower, self.preprocessing = tower, preprocessing
        self.k, self.scale = k, scale
        self._know_weights(digest)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        k: int | FromCheckpoint | None = "checkpoint",
        backend: Backend = "auto",
        tokenizer: AnyTokenizer | None = None,
        revision: str | None = None,
        runtime: Runtime = "auto",
        threads: int | None = None,
    ) -> ImageEncoder:
        """An image encoder out of a model folder or from the hub.

        Reads folders of this library, alone or as a part of a `CrossModalEncoder`, and the image
        side of VDR's published cross-modal checkpoints.

        Args:
            name_or_folder: A folder, else the id of a model on the hub.
            device: Where to compute; None for CUDA if there is one, else the CPU.
            dtype: Of weights and hidden states; None for float32. Scores are float32 in any case.
            k: Dimensions kept of each image; None keeps all.
            backend: Of the kernels: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.
            tokenizer: A tokenizer or a folder with one, for folders that hold none.
            revision: Branch, tag or commit on the hub.
            runtime: As in `SparseEncoder.from_pretrained`.
            threads: Of ONNX Runtime; None for one a core.

        Raises:
            ConfigError: The folder, a file in it, or an option is impossible.
            MissingExtraError: A package of the extra `torch` is not installed.
        """
        from vdr_db.checkpoints.image import load_image
        from vdr_db.checkpoints.text import LoadOptions

        options = LoadOptions(
            device=device,
            dtype=dtype,
            k=k,
            tokenizer=tokenizer,
            revision=revision,
            runtime=runtime,
            threads=threads,
            needs_torch={"`backend`": backend not in ("auto", "cpu", "cpu-int8")},
        )
        with understood(Path(name_or_folder)):
            encoder = cls(**vars(load_image(name_or_folder, options)), backend=backend)
        encoder.asked = ("k",) if k != "checkpoint" else ()
        return encoder

    @classmethod
    def from_vision_model(
        cls,
        model: nn.Module,
        tokenizer: AnyTokenizer,
        *,
        vocabulary: str = "from_999",
        projection: Tensor | None = None,
        preprocessing: Preprocessing | None = None,
        activation: Activation = "elu1p",
        k: int | None = None,
        norm: bool = True,
        backend: Backend = "auto",
    ) -> ImageEncoder:
        """A new encoder around a vision model of `transformers`, to be trained.

        Args:
            model: Gives states of patches, such as `ViTModel` or `CLIPVisionModel`.
            tokenizer: Of the text side: a folder, a `tokenizers.Tokenizer` or a fast tokenizer of
                transformers.
            vocabulary: Kind of the columns, as on the text side.
            projection: `[V, H]`, first values of the projection, such as word embeddings of the
                kept columns; None for small random ones, the same in every run.
            preprocessing: What the model was trained with; None for CLIP's at the model's size.
            activation: Turns scores into weights.
            k: Dimensions kept of each image; None for all.
            norm: Scale each vector to L2 norm 1 before selection.
            backend: Of the kernels.

        Raises:
            ConfigError: The parts do not fit together.
        """
        import torch

        from vdr_db.towers.image import ImageHead, ImageTower
        from vdr_db.towers.image_body import TransformersBody

        body = TransformersBody(model)
        words = tokenizer_of(tokenizer)
        columns = Vocabulary.from_tokenizer(words, vocabulary)
        width = body.hidden_size
        head = ImageHead(width, columns.columns)
        if projection is None:
            generator = torch.Generator().manual_seed(0)
            projection = torch.randn(columns.columns, width, generator=generator) * width**-0.5
        if tuple(projection.shape) != (columns.columns, width):
            raise ConfigError(
                f"`projection` must be [{columns.columns}, {width}], got {list(projection.shape)}."
            )
        first = {
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
            "projection": projection.detach().to("cpu", torch.float32, copy=True),
        }
        head.load_state_dict(first, strict=True, assign=True)
        some = next(body.parameters())
        head.to(device=some.device, dtype=some.dtype)
        return cls(
            tower=ImageTower(body, head).eval(),
            tokenizer=words,
            vocabulary=columns,
            preprocessing=preprocessing or Preprocessing(size=body.image_size),
            activation=activation,
            k=k,
            norm=norm,
            backend=backend,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoder as a folder that `from_pretrained` reads; all of it or nothing.

        Args:
            folder: Where to. An image encoder saved there before is replaced; anything else is left
                alone.

        Raises:
            ConfigError: The place holds something else, or cannot be written.
        """
        from vdr_db.checkpoints.image import ImageParts, save_image

        save_image(self._parts(ImageParts), folder)

    @property
    def tower(self) -> ImageTower:
        """Module of body and head.

        Raises:
            ConfigError: ONNX Runtime computes it.
        """
        return trainable(self._tower)

    @tower.setter
    def tower(self, tower: ImageTower | OnnxImageTower) -> None:
        self._tower = tower

    def settings(self) -> dict[str, str]:
        """All but the weights that changes a vector, see `EncoderStamp.settings`."""
        from vdr_db.checkpoints.image import ImageParts

        return self._settings(ImageParts, tower=self._tower)

    @property
    def _main_tower(self) -> ImageTower | OnnxImageTower:
        return self._tower

    @property
    def _stored_k(self) -> int | None:
        return self.k

    def named_weights(self) -> dict[str, Weight]:
        """All weights by our names."""
        return dict(self._tower.named_parameters())

    def __repr__(self) -> str:
        """What it computes and where."""
        return self._described(f"{self._tower.config.patches} patches")

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
        """Vectors of images; what cannot be read is named in the result and stops nothing.

        Images are read and decoded in threads while earlier ones are encoded, a few batches
        ahead, so that memory does not grow with their number.

        Args:
            images: Paths, bytes of image files, PIL images and NumPy arrays (`[height, width]` or
                `[height, width, 1, 3 or 4]`, uint8, uint16, bool or float in [0, 1]), mixed as you
                like; or one folder, for all images in it and below.
            batch_size: Images in a batch; None for 16 on the CPU and 128 elsewhere.
            threads: For reading and decoding; None for 4, or fewer where there are fewer cores.
            max_pixels: Largest image that is decoded, width times height.
            thumbnail_px: Longest side, in [8, 256], of a small JPEG made of each image; None
                makes none.
            show_progress: Draw a progress bar on stderr.

        Returns:
            Rows in the order of the images, their names, and the refused ones with reasons.

        Raises:
            TypeError: One image came instead of a sequence, or an item is no image at all.
            InputError: An item is a text; or the folder holds no image.
            ConfigError: A vector is not finite, so the weights of the model are broken; or a number
                is impossible.
            MissingExtraError: Pillow is not installed.
        """
        require("PIL.Image", "images")
        sources = named_images(images)
        size = BATCH_SIZE.get(self.device.type, BATCH_SIZE_ELSEWHERE)
        size = positive("batch_size", size if batch_size is None else batch_size)
        workers = positive("threads", min(4, os.cpu_count() or 1) if threads is None else threads)
        items = prepared_images(
            sources,
            self.preprocessing,
            Budget(image_pixels=positive("max_pixels", max_pixels)),
            workers=workers,
            ahead=2 * size,
            thumbnail_px=checked_thumbnail_px(thumbnail_px),
        )
        parts = [SparseRows.empty(0, self.vocabulary.size)]
        names: list[str] = []
        digests: list[str] = []
        thumbnails: list[str] = []
        refused: dict[int, str] = {}
        total = len(sources) if isinstance(sources, Sequence) else None
        with progress(total, "image", shown=show_progress) as bar:
            for batch in image_batches(items, size):
                refused.update(
                    {len(names) + i: one.reason for i, one in enumerate(batch) if one.reason}
                )
                parts.append(self._encode_batch(batch, first=len(names)))
                names += [one.name for one in batch]
                digests += [one.digest for one in batch]
                thumbnails += [one.thumbnail for one in batch]
                bar.update(len(batch))
        return EncodedImages(
            SparseRows.concat(parts),
            tuple(names),
            tuple(digests),
            refused,
            () if thumbnail_px is None else tuple(thumbnails),
        )

    def patch_weights(
        self, image: ImageSource, ids: npt.ArrayLike, *, max_pixels: int = MAX_PIXELS
    ) -> npt.NDArray[np.float32]:
        """The weight each patch alone would give to some tokens; the largest is the image's own.

        Args:
            image: One image.
            ids: `[D]` token ids, each with a column, such as those of the image's row.
            max_pixels: As in `encode_images`.

        Returns:
            `[P, D]`, patches in rows from the top.

        Raises:
            InputError: The image cannot be read, or the model computes no weight of an id.
        """
        check_kind(image, 0)
        columns = self.vocabulary.columns_of(ids)
        budget = Budget(image_pixels=positive("max_pixels", max_pixels))
        pixels = self.preprocessing.apply(read_image(image, budget).image)
        tower = self._tower
        found = activate(tower.states(pixels) @ tower.rows(columns).T, self.activation)
        length = norm_of(tower.pooled(pixels), self.activation) if self.norm else np.float32(1)
        weights: FloatArray = found * np.float32(self.scale or 1) / length
        return weights

    def _encode_batch(self, batch: Sequence[PreparedImage], *, first: int) -> SparseRows:
        good = [i for i, one in enumerate(batch) if one.pixels is not None]
        pixels = [one.pixels for one in batch if one.pixels is not None]
        empty = SparseRows.empty(1, self.vocabulary.size)
        if not good:
            return SparseRows.concat([empty] * len(batch))
        named = [f"image {batch[i].name!r} (number {first + i})" for i in good]
        rows = scaled(self._rows(pixels, named), self.scale)
        if len(good) == len(batch):
            return rows
        place = np.full(len(batch), len(good), np.int64)  # the empty row at the end
        place[good] = np.arange(len(good))
        return SparseRows.concat([rows, empty])[place]

    def _rows(self, pixels: Sequence[FloatArray], names: Sequence[str]) -> SparseRows:
        tower = self._tower
        if isinstance(tower, OnnxImageTower):
            select = partial(row_of, k=self.k, activation=self.activation, norm=self.norm)
            pairs = zip(pixels, names, strict=True)
            found = [select(tower.pooled(one), self.vocabulary, name=name) for one, name in pairs]
            return SparseRows.concat(found)
        import torch

        from vdr_db.encoders.selection import to_sparse_rows

        with tower.evaluating():
            stacked = torch.from_numpy(np.stack(pixels)).to(self.device, non_blocking=True)
            pooled = tower(stacked, backend=self.backend)
        return to_sparse_rows(
            pooled.logits,
            self.vocabulary,
            k=self.k,
            activation=self.activation,
            norm=self.norm,
            backend=self.backend,
            name=names.__getitem__,
        )
