"""What encoders of texts and of images share: their options, their identity, their progress bar."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from vdr_db.checkpoints.graphs import trainable
from vdr_db.checkpoints.identity import settings_of_parts
from vdr_db.checkpoints.weights import Weight, digest
from vdr_db.counts import counted
from vdr_db.errors import ConfigError, MissingExtraError, require
from vdr_db.kernels import ACTIVATIONS, BACKENDS, Activation, Backend
from vdr_db.stamp import EncoderStamp
from vdr_db.text.tokenization import TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from vdr_db.checkpoints.image import ImageParts
    from vdr_db.checkpoints.text import TextParts
    from vdr_db.towers.onnx import OnnxTower
    from vdr_db.towers.torch_tower import TorchTower

    AnyTower = TorchTower | OnnxTower[Any, Any]

__all__ = ["Bar", "Encoder", "positive", "progress"]

Parts = TypeVar("Parts", "TextParts", "ImageParts")


class Encoder(ABC):
    """Something that makes sparse vectors over the token ids of a tokenizer.

    Attributes:
        vocabulary: Column, id and text of every token.
        tokenizer: Whose tokens the columns are.
        activation: Turns scores into weights.
        norm: Whether vectors have L2 norm 1 before selection.
        backend: Of the kernels.
        model: Name or folder it came from.
        revision: Revision on the hub.
        asked: Settings that the caller of `from_pretrained` chose, see `EncoderStamp.asked`.
    """

    asked: Sequence[str] = ()

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        activation: Activation,
        norm: bool,
        backend: Backend,
        model: str,
        revision: str,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ConfigError(f"`activation` must be one of {ACTIVATIONS}, got {activation!r}.")
        if backend not in BACKENDS:
            raise ConfigError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.activation: Activation = activation
        self.norm = norm
        self.backend: Backend = backend
        self.model = model
        self.revision = revision
        self._digest: tuple[object, str] | None = None

    @property
    @abstractmethod
    def _main_tower(self) -> AnyTower:
        """The tower of what is stored: of documents, or of images."""

    @property
    @abstractmethod
    def _stored_k(self) -> int | None:
        """Dimensions kept of what is stored."""

    @abstractmethod
    def named_weights(self) -> dict[str, Weight]:
        """All weights by our names, in memory or in their file; those of a shared tower once."""

    def named_tensors(self) -> dict[str, Tensor]:
        """The same as tensors of torch.

        Raises:
            ConfigError: ONNX Runtime computes this encoder.
        """
        trainable(self._main_tower)
        return cast("dict[str, Tensor]", self.named_weights())

    @property
    def device(self) -> torch.device:
        """Where the weights are; with ONNX Runtime something that reads the same, without torch."""
        return cast("torch.device", self._main_tower.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and hidden states; `"torch.float32"` as a text with ONNX Runtime."""
        return cast("torch.dtype", self._main_tower.dtype)

    @property
    def precision(self) -> str:
        """In which the body computes: `"float32"`, `"bfloat16"`, `"int8"`; or a dtype of torch."""
        return self._main_tower.precision

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoder as a folder that `from_pretrained` reads."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Add a sparse encoder",
        **saving: Any,
    ) -> str:
        """Uploads the encoder to the hub, as `save_pretrained` writes it.

        Args:
            repo_id: `owner/name`; made if need be.
            private: Whether a new repository is private.
            token: Of the hub; None for the one that is logged in.
            revision: Branch; None for the main one.
            message: Of the commit.
            saving: More arguments of `save_pretrained`, such as `card=`.

        Returns:
            Where the commit can be seen.

        Raises:
            ConfigError: The hub refuses, or cannot be reached.
            MissingExtraError: `huggingface_hub` is not installed.
        """
        hub = require("huggingface_hub", "torch")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder, **saving)
            try:
                hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
                done = hub.upload_folder(
                    repo_id=repo_id,
                    folder_path=str(folder),
                    token=token,
                    revision=revision,
                    commit_message=message,
                )
            except Exception as error:  # no network, no right, no such owner: many kinds
                raise ConfigError(
                    f"{repo_id!r} cannot be written on the hub: {error}; log in with "
                    "`hf auth login` or pass `token=`."
                ) from error
        return str(done)

    def stamp(self) -> EncoderStamp:
        """Identity of this encoder, for stores. The first call reads all weights once."""
        return EncoderStamp(
            model=self.model,
            revision=self.revision,
            weights=self.remember_weights(),
            tokenizer=self.vocabulary.fingerprint,
            vocabulary=self.vocabulary.kind,
            head=self._main_tower.head_name,
            activation=self.activation,
            k=self._stored_k,
            library_version=__version__,
            settings=self.settings(),
            asked=self.asked,
        )

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """All but the weights that changes a vector, see `EncoderStamp.settings`."""

    def _settings(self, kind: type, **others: object) -> dict[str, str]:
        """Those of the parts of a kind, with others by name or in their place."""
        names = [part.name for part in fields(kind) if part.name not in (*others, "digest")]
        return settings_of_parts({**{name: getattr(self, name) for name in names}, **others})

    def remember_weights(self) -> str:
        """Digest of the weights, computed anew only after one of them was written in place.

        Moving or rounding the towers afterwards does not change it, so an encoder in bfloat16 and
        its float32 original count as one model.
        """
        weights = self.named_weights()
        version = _version(weights)
        if self._digest is None or self._digest[0] != version:
            self._digest = (version, digest(weights))
        return self._digest[1]

    def _know_weights(self, known: str) -> None:
        """Takes over the digest of the weights, where it is known."""
        if known:
            self._digest = (_version(self.named_weights()), known)

    def _parts(self, kind: type[Parts]) -> Parts:
        """What this encoder is made of, to be saved; the digest follows from the weights."""
        names = [part.name for part in fields(kind) if part.name != "digest"]
        return kind(**{name: getattr(self, name) for name in names})

    def _described(self, *parts: str) -> str:
        k = "all" if self._stored_k is None else self._stored_k
        said = [repr(self.model), *parts, f"{self.vocabulary.columns} columns", f"k={k}"]
        try:
            said.append(f"{self.precision} on {self.device}")
        except MissingExtraError:  # of a side that cannot run here
            said.append("without torch")
        return f"{type(self).__name__}({', '.join(said)})"


def _version(weights: dict[str, Weight]) -> object:
    """Something that changes whenever a weight is replaced or written in place."""
    return [(id(weight), getattr(weight, "_version", 0)) for weight in weights.values()]


def positive(name: str, value: int) -> int:
    """A number of things, at least 1.

    Args:
        name: For the message.
        value: What came.

    Raises:
        ConfigError: It is no integer, or below 1.
    """
    return counted(name, value)


class Bar(Protocol):
    """Counts what is done."""

    def update(self, n: float | None = 1, /) -> object:
        """Counts n more."""


class _Unseen:
    """A progress bar that draws nothing; making one of `tqdm` takes longer than a query's rest."""

    def update(self, n: float | None = 1, /) -> None:
        """Does nothing."""


def progress(total: int | None, unit: str, *, shown: bool) -> AbstractContextManager[Bar]:
    """A progress bar on stderr, or one that draws nothing."""
    if not shown:
        return nullcontext(_Unseen())
    from tqdm import tqdm

    bar: tqdm[Any] = tqdm(total=total, unit=unit, desc="encode")
    return bar
