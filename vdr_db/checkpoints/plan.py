"""What a model folder says about its encoder, whatever the layout of the folder."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vdr_db.checkpoints.folders import settings_of
from vdr_db.errors import ConfigError
from vdr_db.text.own_weights import OwnWeights
from vdr_db.towers.families import Family, WeightNames

__all__ = [
    "GRAPHS",
    "MOST_TOKENS",
    "Compatibility",
    "Entry",
    "FromCheckpoint",
    "Layout",
    "Padding",
    "Plan",
    "StaticPlan",
    "TowerPlan",
    "compatibility_of",
    "model_max_length",
    "tower_names",
]

GRAPHS = "graphs"
"""Key of a settings file: which weights the ONNX graphs beside it were written for."""

MOST_TOKENS = 1 << 31
"""More tokens than any text has."""

FromCheckpoint: TypeAlias = Literal["checkpoint"]
Padding: TypeAlias = Literal["longest", "max_length"]


@dataclass(frozen=True)
class Compatibility:
    """How VDR's published code pads texts, whose padding takes part in the maximum.

    Attributes:
        padded_to: `"max_length"`, the maximal length, as for the published results; or `"longest"`,
            the longest of each batch, as later versions do.
        batch_size: Texts in a batch of `"longest"`, in the given order.
    """

    padded_to: Padding
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: One is impossible.
        """
        if self.padded_to not in ("longest", "max_length"):
            raise ConfigError(
                "`compatibility` must be None, 'longest', 'max_length' or a `Compatibility` of "
                f"these, got {self.padded_to!r}."
            )
        size = _index(self.batch_size)
        if size is None or size < 1:
            raise ConfigError(
                f"`batch_size` of a `Compatibility` must be at least 1, got {self.batch_size!r}."
            )

    @classmethod
    def of(cls, value: Compatibility | Padding | None) -> Compatibility | None:
        """What a caller means by a word, by a `Compatibility` or by None.

        Raises:
            ConfigError: The word is unknown.
        """
        return value if value is None or isinstance(value, Compatibility) else cls(value)


def compatibility_of(
    compatibility: Compatibility | Padding | None,
    pool_padding: Padding | bool | None,
    padding_batch_size: int | None,
) -> Compatibility | None:
    """What a caller of `from_pretrained` means, who may know it by its two older names.

    Args:
        compatibility: The argument of today.
        pool_padding: Its older name; None where it was not given.
        padding_batch_size: The older place of `Compatibility.batch_size`.

    Raises:
        ConfigError: A value is impossible.
    """
    if pool_padding is None and padding_batch_size is None:
        return Compatibility.of(compatibility)
    warnings.warn(
        "`pool_padding` and `padding_batch_size` are now one argument: pass "
        "compatibility='max_length', 'longest' or Compatibility('longest', n).",
        DeprecationWarning,
        stacklevel=3,
    )
    padded_to = "max_length" if pool_padding is True else pool_padding or None
    found = Compatibility.of(padded_to) or Compatibility.of(compatibility)
    size = 128 if padding_batch_size is None else padding_batch_size
    checked = replace(found or Compatibility("longest"), batch_size=size)
    return found and checked


@dataclass(frozen=True)
class Entry:
    """How texts of one side, queries or documents, become vectors.

    Attributes:
        max_length: Most tokens of a text, special tokens included; None for as many as the model
            has positions.
        k: Dimensions kept, or None for all with a weight.
        prompt: Put before each text.
    """

    max_length: int | None = None
    k: int | None = None
    prompt: str = ""

    def checked(self, *, columns: int, positions: int, special: int) -> Entry:
        """The same with a maximal length that is a number.

        Args:
            columns: Dimensions the model computes.
            positions: Most tokens it has positions for.
            special: Special tokens around a text.

        Raises:
            ConfigError: `k` or the maximal length is impossible for this model.
        """
        if not isinstance(self.prompt, str):
            raise ConfigError(f"`prompt` must be a text, got {self.prompt!r}.")
        k, length = _index(self.k), _index(self.max_length)
        if self.k is not None and not (k is not None and 1 <= k <= columns):
            raise ConfigError(
                f"`k` must be None or an integer in [1, {columns}], got {self.k!r}; "
                "the model computes that many dimensions."
            )
        given = self.max_length
        length = positions if given is None else length
        if length is None or not special < length <= positions:
            raise ConfigError(
                f"`max_length` must be an integer in [{special + 1}, {positions}], got {given!r}; "
                f"the model has {positions} positions, and {special} go to special tokens."
            )
        return replace(self, max_length=length, k=k)


def _index(value: Any) -> int | None:
    """An integer of any kind as an `int`; `None` for everything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True)
class TowerPlan:
    """Where the weights of one tower are.

    Attributes:
        config: Config of the body in the keys of its family.
        body_prefix: Prefix of the body's weights.
        head_prefix: Prefix of the head's weights.
        folder: Folder of the weights; None for that of the plan.
        family: Of the body; None for a model that transformers computes.
        is_decoder: Whether that model is a decoder, not a masked language model.
        bidirectional: Whether a decoder's texts are read in both directions.
        adapter: Whether the folder holds a LoRA adapter, to be merged into its base model.
        dropped: Token ids that a head of token weights leaves out; None for all special ones.
    """

    config: Mapping[str, Any]
    body_prefix: str = ""
    head_prefix: str = ""
    folder: Path | None = None
    family: Family | None = None
    is_decoder: bool = False
    bidirectional: bool = False
    adapter: bool = False
    dropped: Sequence[int] | None = None


@dataclass(frozen=True)
class StaticPlan:
    """Where the weights of a static side are, one for each token id.

    Attributes:
        folder: Holds them as the tensor `weight`, and its tokenizer.
        file: JSON of token text -> weight instead.
        name: Name of the tensor.
    """

    folder: Path
    file: Path | None = None
    name: str = "weight"


@dataclass(frozen=True)
class Plan:
    """Everything a folder says about its encoder.

    Attributes:
        folder: The folder with the weights.
        layout: Name of its layout.
        head: `"vdr"`, `"mlm"`, `"mean"` or `"token_weights"`.
        activation: Name of the activation.
        vocabulary: Kind of the vocabulary.
        document: Tower of the documents.
        query: Tower of the queries, or their static weights; None when both share one tower.
        document_entry: Settings of the documents.
        query_entry: Settings of the queries.
        query_activation: Of the queries; None for that of the documents.
        query_gate: Static weights that a query's vector is multiplied with: tokens that are not in
            it lose theirs.
        tokenizer: Folder of the tokenizer; None for `folder`.
        query_tokenizer: Folder of the queries' tokenizer; None for that of the documents.
        norm: Whether vectors have L2 norm 1 before selection.
        lexical: Whether a text's own tokens are always kept.
        own_weights: What a text's own tokens weigh besides; None for nothing.
        lower_case: Whether texts are lower-cased before the tokenizer.
        query_lower_case: The same for queries with a tokenizer of their own.
        tokenizer_id: Model on the hub whose tokenizer is meant when the folder holds none.
        ignored: Prefixes of weights that belong to something else.
        fresh: Whether the head starts without weights.
        graphs: What the folder says about its ONNX graphs; None where it has none.
    """

    folder: Path
    layout: str
    head: str
    activation: str
    vocabulary: str
    document: TowerPlan
    query: TowerPlan | StaticPlan | None = None
    document_entry: Entry = field(default_factory=Entry)
    query_entry: Entry = field(default_factory=Entry)
    query_activation: str | None = None
    query_gate: StaticPlan | None = None
    tokenizer: Path | None = None
    query_tokenizer: Path | None = None
    norm: bool = False
    lexical: bool = False
    own_weights: OwnWeights | None = None
    lower_case: bool = False
    query_lower_case: bool = False
    tokenizer_id: str | None = None
    ignored: tuple[str, ...] = ()
    fresh: bool = False
    graphs: Mapping[str, Any] | None = None

    @property
    def family(self) -> Family | None:
        """Of the documents' body; None for a model that transformers computes."""
        return self.document.family


@dataclass(frozen=True)
class Layout:
    """One kind of folder.

    Attributes:
        name: For messages.
        recognises: Whether a folder is of this kind.
        read: Its plan.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Plan]


def model_max_length(folder: Path) -> int | None:
    """The limit of a folder's tokenizer, or None where it has none."""
    file = folder / "tokenizer_config.json"
    settings = settings_of(file) if file.is_file() else {}
    limit = settings.get("model_max_length", settings.get("max_len"))
    # a tokenizer without a limit says so with a number of thirty digits
    if isinstance(limit, (int, float)) and 0 < limit < MOST_TOKENS:
        return int(limit)
    return None


def tower_names(
    family: Family, layers: int, head: str, body_prefix: str, head_prefix: str
) -> WeightNames:
    """Weight of a tower of texts -> its names in a checkpoint.

    Args:
        family: Of the body.
        layers: Of the body.
        head: `"vdr"`, `"mlm"` or `"mean"`.
        body_prefix: Prefix of the body's weights in the checkpoint.
        head_prefix: Prefix of the head's.
    """
    names: WeightNames = {}
    for ours, theirs in family.body_names(layers, prefix=body_prefix).items():
        names[f"body.{ours}"] = theirs
    for ours, theirs in family.head_names(head).items():
        names[f"head.{ours}"] = tuple(head_prefix + name for name in theirs)
    if head == "mlm":
        names["head.decoder.weight"] = (head_prefix + family.decoder,)
    return names
