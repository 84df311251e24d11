"""What a store remembers of the encoder whose vectors it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from vdr_db.errors import ConfigError

__all__ = ["ADJUSTABLE", "EncoderStamp"]

REPLACED = {"vdr-tiny": "vdr-mini", "vdr-tiny-image": "vdr-mini"}
"""Models that were shipped once -> what has taken their place."""

ADJUSTABLE = {
    "document_entry.k": "k",
    "query_entry.k": "query_k",
    "document_entry.max_length": "max_length",
    "query_entry.max_length": "query_max_length",
    "k": "k",
}
"""Settings that may differ where a caller asked for it -> the argument of `from_pretrained`."""

_TEXTS = {
    "tokenizer": "tokenizer fingerprint",
    "vocabulary": "vocabulary kind",
    "head": "head",
    "activation": "activation",
    "weights": "weights digest",
}
_OF_TOKENIZERS = ("tokenizer.", "query_tokenizer.", "vocabulary.", "own_weights.")


@dataclass(frozen=True)
class EncoderStamp:
    """Identity of an encoder, as far as its vectors can be compared with others.

    Attributes:
        model: Name or folder the model was loaded from; for people, never compared.
        revision: Revision of the model on its hub, or `""`.
        weights: SHA-256 (hex) over the weights as loaded, or `""` when unknown.
        tokenizer: `Vocabulary.fingerprint` of the tokenizer.
        vocabulary: `Vocabulary.kind`: which token ids may carry a weight.
        head: `"vdr"`, `"mlm"` or `"image"`; stamps of earlier versions have `"vdr+image"` for a
            text and an image encoder together.
        activation: `"elu1p"`, `"log1p_relu"`, `"double_log1p_relu"` or `"none"`.
        k: Kept dimensions per document, or `None` for all; recorded, compared in `settings`.
        library_version: Version of this library that wrote the stamp; never compared.
        settings: All else that changes a vector: dotted name -> JSON text, or the SHA-256 of a long
            one. What is unset or off is left out. Empty in stamps of earlier versions.
        asked: Names among `ADJUSTABLE` that a caller set on purpose.
        probes: `"<side> <precision>"` -> heaviest weights of three texts, see
            `vdr_db.connectors.probes`.
        image: Of the encoder of images beside, `None` where there is none.
    """

    model: str
    tokenizer: str
    vocabulary: str
    head: str
    activation: str
    revision: str = ""
    weights: str = ""
    k: int | None = None
    library_version: str = ""
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    asked: Sequence[str] = ()
    probes: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)
    image: EncoderStamp | None = None

    def to_dict(self) -> dict[str, Any]:
        """The stamp as JSON types."""
        # What is as usual is left out, so that stamps of older versions stay as they are.
        added = ("settings", "asked", "probes", "image")
        data = {name: one for name, one in asdict(self).items() if name not in added or one}
        if self.asked:
            data["asked"] = list(self.asked)
        if self.image is not None:
            data["image"] = self.image.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EncoderStamp:
        """The stamp that `to_dict` wrote; fields added by newer versions are ignored.

        Raises:
            ConfigError: A field that identifies the encoder is missing or of another type.
        """
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        for name in ("model", "tokenizer", "vocabulary", "head", "activation"):
            if not isinstance(values.get(name), str):
                raise ConfigError(
                    f"An encoder stamp needs the text field `{name}`, got {values.get(name)!r}; "
                    "the file or metadata that holds it is damaged or not ours."
                )
        kinds: dict[str, type | tuple[type, ...]] = {
            "settings": Mapping,
            "probes": Mapping,
            "asked": (list, tuple),
            "image": Mapping,
        }
        for name, kind in kinds.items():
            if name in values and not isinstance(values[name], kind):
                raise ConfigError(
                    f"The field `{name}` of an encoder stamp holds {type(values[name]).__name__}; "
                    "the file or metadata that holds it is damaged or not ours."
                )
        if "asked" in values:
            values["asked"] = tuple(values["asked"])
        if "image" in values:
            values["image"] = cls.from_dict(values["image"])
        return cls(**values)

    @property
    def reads_images(self) -> bool:
        """Whether it is of an encoder of texts and images."""
        return self.image is not None or self.head.endswith("+image")

    @property
    def is_old(self) -> bool:
        """Whether it knows weights, words, head and activation alone."""
        return not self.settings

    def as_before(self) -> EncoderStamp:
        """The same as earlier versions wrote it: text and image part in one, no settings."""
        bare = replace(self, settings={}, asked=(), probes={}, image=None)
        if self.image is None:
            return bare
        both = hashlib.sha256(f"{self.weights} {self.image.weights}".encode()).hexdigest()
        return replace(bare, weights=both, head=f"{self.head}+{self.image.head}")

    def with_images_of(self, other: EncoderStamp) -> EncoderStamp:
        """This one of texts with the image part of a model of both, and that model's name."""
        return replace(self, model=other.model, revision=other.revision, image=other.image)

    def difference(self, other: EncoderStamp) -> list[str]:
        """Why vectors of the two encoders must not be mixed; empty when they may be.

        `self` is what the store holds, `other` what is being opened with. Weights are compared when
        both are known; without them one of the two is a tokenizer alone, and so are the settings
        that count. Queries may come from another tower of the same model: that is one stamp. Images
        are compared where both have them.
        """
        if self.is_old and self.image is None:
            other = other.as_before() if self.reads_images else replace(other, image=None)
        reasons = []
        for name, meaning in _TEXTS.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "weights" and not (mine and theirs):
                continue
            if mine != theirs:
                reasons.append(f"{meaning} {mine!r} (store) against {theirs!r} (encoder)")
        if not (self.is_old or other.is_old):
            reasons += self._setting_differences(other)
        if self.image is not None and other.image is not None:
            reasons += [f"images: {reason}" for reason in self.image.difference(other.image)]
        return reasons

    def _setting_differences(self, other: EncoderStamp) -> list[str]:
        reasons = []
        for name in sorted({*self.settings, *other.settings}):
            mine, theirs = self.settings.get(name), other.settings.get(name)
            is_asked = name in ADJUSTABLE and name in {*self.asked, *other.asked}
            is_known = (self.weights and other.weights) or name.startswith(_OF_TOKENIZERS)
            if mine == theirs or is_asked or not is_known:
                continue
            told = f"`{name}` {mine or 'unset'} (store) against {theirs or 'unset'} (encoder)"
            if name in ADJUSTABLE:
                option = ADJUSTABLE[name]
                told += f", which differs on purpose where `{option}=` is passed"
            reasons.append(told)
        return reasons
