"""The two sides of an encoder out of a plan: towers, static weights, tokenizers.

A side with static weights needs no torch. Where torch is not installed, such an encoder still
answers queries, and names what is missing when documents are to be encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.folders import understood
from vdr_db.checkpoints.graphs import open_text_towers
from vdr_db.checkpoints.plan import Plan, StaticPlan, tower_names
from vdr_db.checkpoints.tokenizers import read_tokenizer
from vdr_db.checkpoints.tower_plans import read_static
from vdr_db.errors import ConfigError, require
from vdr_db.text.tokenization import TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.interface import GraphRuntime, Precision
from vdr_db.towers.onnx import OnnxTextTower
from vdr_db.towers.static import StaticTower

if TYPE_CHECKING:
    import torch

    from vdr_db.towers.text import Tower

__all__ = ["AbsentTower", "Sides", "TextTower", "TowerOptions", "load_sides"]

TextTower: TypeAlias = "Tower | OnnxTextTower"
"""A tower of texts, whichever runtime computes it; static sides answer the same calls."""


class TowerOptions(Protocol):
    """How towers are loaded."""

    @property
    def device(self) -> str | torch.device | None:
        """Of torch."""

    @property
    def dtype(self) -> str | torch.dtype | None:
        """Of torch."""

    @property
    def threads(self) -> int | None:
        """Of a graph."""

    @property
    def graph_runtime(self) -> GraphRuntime:
        """What computes graphs."""

    @property
    def precision(self) -> Precision:
        """Of a graph; torch has its dtype."""


@dataclass(frozen=True)
class Sides:
    """What both sides of an encoder are made of; see `TextParts` for the fields."""

    document: TextTower
    query: TextTower
    query_tokenizer: TextTokenizer | None
    query_gate: StaticTower | None
    digest: str


class AbsentTower:
    """A tower of documents that cannot run, as torch is not installed; its queries need none.

    Attributes:
        config: Sizes of the body.
        head_name: Name of its head.
        packs_exactly: Never asked.
    """

    packs_exactly = True
    constants: Mapping[str, Any] | None = None

    def __init__(self, plan: Plan, vocabulary: Vocabulary) -> None:
        if plan.family is None or plan.head != "mlm":
            require("torch", "torch")
        assert plan.family is not None
        self.config = plan.family.body_config(plan.document.config)
        self.head_name = plan.head
        self._plan = plan

    def named_parameters(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Weights under the names of a tower, so that the encoder's stamp is what it always is."""
        yield from self._weights.items()

    @cached_property
    def _weights(self) -> dict[str, npt.NDArray[np.float32]]:
        from vdr_db.checkpoints.weights import Checkpoint, check_layers

        where, plan = self._plan.document, self._plan
        assert where.family is not None
        checkpoint = Checkpoint(where.folder or plan.folder)
        check_layers(self.config.layers, checkpoint)
        present = set(checkpoint.names)
        names = tower_names(
            where.family, self.config.layers, plan.head, where.body_prefix, where.head_prefix
        )
        found = {}
        for ours, theirs in names.items():
            name = next((name for name in theirs if name in present), None)
            if name is not None:
                found[ours] = checkpoint.array(name)
        word, decoder = "body.embeddings.word.weight", "head.decoder.weight"
        if decoder in found and np.array_equal(found.get(word, found[decoder]), found[decoder]):
            found[word] = found.pop(decoder)
        return found

    def __getattr__(self, name: str) -> Any:
        """Anything else needs torch.

        Raises:
            MissingExtraError: Always, unless for Python's own names.
        """
        if name.startswith("_"):
            raise AttributeError(name)
        return require("torch", "torch")


def load_sides(
    plan: Plan,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    runtime: Literal["onnx", "torch"],
    options: TowerOptions,
) -> Sides:
    """Both sides with their weights.

    Args:
        plan: Of a folder.
        tokenizer: Of the documents.
        vocabulary: Of the columns.
        runtime: `"onnx"` for the graphs of the folder.
        options: Device and dtype for torch, threads, precision and library for graphs.

    Raises:
        ConfigError: Weights are missing or damaged, or the sides have other tokens.
        MissingExtraError: A tower needs torch.
    """
    with understood(plan.folder):
        return _load_sides(plan, tokenizer, vocabulary, runtime, options)


def _load_sides(
    plan: Plan,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    runtime: Literal["onnx", "torch"],
    options: TowerOptions,
) -> Sides:
    words = None
    if plan.query_tokenizer is not None:
        words = read_tokenizer(plan.query_tokenizer, lower_case=plan.query_lower_case)
        _check_same_tokens(vocabulary, words)
    document: TextTower | AbsentTower
    query: TextTower | StaticTower | None
    digest = ""
    if runtime == "onnx":
        towers = open_text_towers(
            plan, vocabulary, options.threads, options.precision, options.graph_runtime
        )
        document = towers["document"]
        query = None if isinstance(plan.query, StaticPlan) else towers.get("query", document)
    elif isinstance(plan.query, StaticPlan) and find_spec("torch") is None:
        document, query = AbsentTower(plan, vocabulary), None
    else:
        require("torch", "torch")
        from vdr_db.checkpoints.text_towers import build_towers

        document, query, digest = build_towers(plan, vocabulary, options.device, options.dtype)

    def static(where: StaticPlan) -> StaticTower:
        return StaticTower(read_static(where, words or tokenizer, vocabulary.size))

    if query is None:
        assert isinstance(plan.query, StaticPlan)
        query, digest = static(plan.query), ""
    gate = None if plan.query_gate is None else static(plan.query_gate)
    both = cast(TextTower, document), cast(TextTower, query)
    return Sides(*both, words, gate, digest)


def _check_same_tokens(vocabulary: Vocabulary, words: TextTokenizer) -> None:
    other = Vocabulary.from_tokenizer(words, vocabulary.kind)
    if other.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"both sides must have the same tokens, got {vocabulary.size} of the documents and "
            f"{other.size} of the queries that differ; dimensions would not mean the same."
        )
