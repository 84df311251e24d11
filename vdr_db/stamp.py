"""What a store remembers of the encoder whose vectors it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vdr_db.errors import ConfigError

__all__ = ["EncoderStamp"]


@dataclass(frozen=True)
class EncoderStamp:
    """Identity of an encoder, as far as its vectors can be compared with others.

    Attributes:
        model: Name or folder the model was loaded from; for people, never compared.
        revision: Revision of the model on its hub, or `""`.
        weights: SHA-256 (hex) over the weights as loaded, or `""` when unknown.
        tokenizer: `Vocabulary.fingerprint` of the tokenizer.
        vocabulary: `Vocabulary.kind`: which token ids may carry a weight.
        head: `"vdr"`, `"mlm"` or `"image"`; `"vdr+image"` of a text and an image encoder together.
        activation: `"elu1p"`, `"log1p_relu"`, `"double_log1p_relu"` or `"none"`.
        k: Kept dimensions per document, or `None` for all; recorded, never compared.
        library_version: Version of this library that wrote the stamp; never compared.
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

    def to_dict(self) -> dict[str, Any]:
        """The stamp as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EncoderStamp:
        """The stamp that `to_dict` wrote; fields added by newer versions are ignored.

        Raises:
            ConfigError: A field that identifies the encoder is missing or not a string.
        """
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        for name in ("model", "tokenizer", "vocabulary", "head", "activation"):
            if not isinstance(values.get(name), str):
                raise ConfigError(
                    f"An encoder stamp needs the text field `{name}`, got {values.get(name)!r}; "
                    "the file or metadata that holds it is damaged or not ours."
                )
        return cls(**values)

    def difference(self, other: EncoderStamp) -> list[str]:
        """Why vectors of the two encoders must not be mixed; empty when they may be.

        `self` is what the store holds, `other` what is being opened with. Weights are compared when
        both are known. Queries may come from another tower of the same model: that is one stamp.
        """
        reasons = []
        for name, meaning in (
            ("tokenizer", "tokenizer fingerprint"),
            ("vocabulary", "vocabulary kind"),
            ("head", "head"),
            ("activation", "activation"),
            ("weights", "weights digest"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "weights" and not (mine and theirs):
                continue
            if mine != theirs:
                reasons.append(f"{meaning} {mine!r} (store) against {theirs!r} (encoder)")
        return reasons
