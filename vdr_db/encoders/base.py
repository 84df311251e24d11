"""What encoders of texts and of images share: their options, their identity, their progress bar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from vdr_db.checkpoints.weights import digest
from vdr_db.counts import counted
from vdr_db.errors import ConfigError
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
    from vdr_db.towers.torch_tower import TorchTower

__all__ = ["Encoder", "positive", "progress"]

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
    """

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
    def _main_tower(self) -> TorchTower:
        """The tower of what is stored: of documents, or of images."""

    @property
    @abstractmethod
    def _stored_k(self) -> int | None:
        """Dimensions kept of what is stored."""

    @abstractmethod
    def named_tensors(self) -> dict[str, Tensor]:
        """All weights by our names; those of a shared tower once."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._main_tower.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and the hidden states."""
        return self._main_tower.dtype

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
        )

    def remember_weights(self) -> str:
        """Digest of the weights, computed anew only after one of them was written in place.

        Moving or rounding the towers afterwards does not change it, so an encoder in bfloat16 and
        its float32 original count as one model.
        """
        tensors = self.named_tensors()
        version = _version(tensors)
        if self._digest is None or self._digest[0] != version:
            self._digest = (version, digest(tensors))
        return self._digest[1]

    def _know_weights(self, known: str) -> None:
        """Takes over the digest of the weights, where it is known."""
        if known:
            self._digest = (_version(self.named_tensors()), known)

    def _parts(self, kind: type[Parts]) -> Parts:
        """What this encoder is made of, to be saved; the digest follows from the weights."""
        names = [part.name for part in fields(kind) if part.name != "digest"]
        return kind(**{name: getattr(self, name) for name in names})

    def _described(self, *parts: str) -> str:
        k = "all" if self._stored_k is None else self._stored_k
        said = [repr(self.model), *parts, f"{self.vocabulary.columns} columns", f"k={k}"]
        return f"{type(self).__name__}({', '.join(said)}, {self.dtype} on {self.device})"


def _version(tensors: dict[str, Tensor]) -> object:
    """Something that changes whenever a weight is replaced or written in place."""
    return [(id(tensor), tensor._version) for tensor in tensors.values()]


def positive(name: str, value: int) -> int:
    """A number of things, at least 1.

    Args:
        name: For the message.
        value: What came.

    Raises:
        ConfigError: It is no integer, or below 1.
    """
    return counted(name, value)


def progress(total: int | None, unit: str, *, shown: bool) -> tqdm[Any]:
    """A progress bar on stderr, or one that draws nothing."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not shown, desc="encode")
