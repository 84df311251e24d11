"""Text encoders of every layout in `layouts`: from a folder or the hub to parts.

Nothing here makes an encoder: `load_text` hands out parts, `SparseEncoder` is built of them. The
way back is in `saving`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vdr_db.checkpoints.digests import check_digests, known_digest
from vdr_db.checkpoints.folders import understood
from vdr_db.checkpoints.graphs import Runtime, has_stored_towers, runtime_of
from vdr_db.checkpoints.layouts import OWN_FILE, TEXT_PART, read_plan
from vdr_db.checkpoints.locate import find_tokenizer, locate_model
from vdr_db.checkpoints.plan import Entry, FromCheckpoint, Plan, TowerPlan
from vdr_db.checkpoints.sides import TextTower, load_sides
from vdr_db.checkpoints.weights import MANY_LAYERS, Checkpoint, check_layers, named_weights
from vdr_db.errors import ConfigError
from vdr_db.kernels import Activation
from vdr_db.text.own_weights import OwnWeights
from vdr_db.text.tokenization import AnyTokenizer, TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.interface import GraphRuntime, Precision
from vdr_db.towers.static import StaticTower

if TYPE_CHECKING:
    import torch


__all__ = ["LoadOptions", "TextParts", "load_text"]

_LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
"""Keys of configs that say how many layers a body has."""

LEAST_OPENVINO = (2026, 4)
"""Earlier versions cannot read the attention of our graphs."""

VDR_K = 768
"""Dimensions a new VDR encoder keeps, as the published ones do."""


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of `SparseEncoder.from_pretrained`, which tells what they mean."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    precision: Precision = "float32"
    k: int | FromCheckpoint | None = "checkpoint"
    query_k: int | FromCheckpoint | None = "checkpoint"
    max_length: int | None = None
    query_max_length: int | None = None
    lexical: bool | None = None
    own_weights: OwnWeights | Literal[False] | None = None
    activation: Activation | None = None
    head: str | None = None
    vocabulary: str | None = None
    tokenizer: AnyTokenizer | None = None
    special_tokens_as_text: bool | None = None
    revision: str | None = None
    runtime: Runtime = "auto"
    threads: int | None = None
    needs_torch: Mapping[str, bool] = field(default_factory=dict)
    is_described: bool = False
    """Whether nothing is computed: weights stay in their file where that can be, without graphs."""

    def asked(self) -> tuple[str, ...]:
        """Settings among `vdr_db.stamp.ADJUSTABLE` that are given, not the folder's."""
        given = {
            "document_entry.k": self.k != "checkpoint",
            "query_entry.k": self.query_k != "checkpoint" or self.k != "checkpoint",
            "document_entry.max_length": self.max_length is not None,
            "query_entry.max_length": (self.query_max_length or self.max_length) is not None,
        }
        return tuple(name for name, is_given in given.items() if is_given)

    def asked_runtime(self) -> Runtime:
        """The runtime that is asked for, by itself or by a precision that only one has.

        Raises:
            ConfigError: The other one is asked for as well.
        """
        if self.precision != "int8":
            return self.runtime
        if self.runtime not in ("auto", "onnx"):
            raise ConfigError(
                "`precision` must be 'float32' or 'bfloat16' with runtime="
                f"{self.runtime!r}, got 'int8'; leave `runtime` alone to run ONNX graphs on ONNX "
                "Runtime; `vdr-db export` writes them."
            )
        return "onnx"

    @property
    def graph_runtime(self) -> GraphRuntime:
        """What would run graphs: OpenVINO for bfloat16, too, where it can."""
        if self.runtime == "auto" and self.precision == "bfloat16" and not _openvino_obstacle():
            return "openvino"
        return "openvino" if self.runtime == "openvino" else "onnx"

    def obstacles(self) -> dict[str, str]:
        """What keeps graphs from running as asked: option -> the rest of a sentence."""
        found = {}
        if str(self.device or "cpu") != "cpu":
            found["`device`"] = f"must be None or 'cpu', got {self.device!r}"
        if self.graph_runtime == "openvino" and (why := _openvino_obstacle()):
            found["openvino"] = f"{why}, run pip install 'vdr-db[openvino]'"
        if self.precision == "bfloat16":
            if self.graph_runtime == "onnx":
                found["`precision`"] = (
                    "must be 'float32' or 'int8' on ONNX Runtime, got 'bfloat16', which "
                    "vdr-db[openvino] computes"
                )
        elif str(self.dtype or "float32").removeprefix("torch.") != "float32":
            found["`dtype`"] = f"must be None or 'float32', got {self.dtype!r}"
        asked = [name for name, is_set in self.needs_torch.items() if is_set]
        return {**found, **dict.fromkeys(asked, "must be left alone")}


def _openvino_obstacle() -> str:
    """Why OpenVINO cannot run graphs; empty where it can."""
    try:
        found = version("openvino")
    except PackageNotFoundError:
        return "is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST_OPENVINO:
        return f"must be {'.'.join(map(str, LEAST_OPENVINO))} or later, got {found}"
    return ""


@dataclass(frozen=True)
class TextParts:
    """What a `SparseEncoder` is made of, by the names of its constructor.

    Attributes:
        document_tower: For documents, with its weights, on the device and in the dtype asked for.
        query_tower: For queries; the same object when shared.
        tokenizer: Of the documents, mostly of both.
        vocabulary: Of both heads.
        activation: Turns scores into weights.
        document_entry: Maximal length, k and prompt of documents.
        query_entry: Maximal length, k and prompt of queries.
        norm: Whether vectors have L2 norm 1 before selection.
        lexical: Whether a text's own tokens are always kept.
        own_weights: What a text's own tokens weigh besides; None for nothing.
        query_tokenizer: Of the queries; None where both sides share one.
        query_activation: Of the queries; None for that of the documents.
        query_gate: Static weights that a query's vector is multiplied with, or None.
        model: Name or folder it came from.
        revision: Revision on the hub.
        digest: Of the weights before they were rounded to the dtype; `""` where they were not.
    """

    document_tower: TextTower
    query_tower: TextTower
    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    activation: Activation
    document_entry: Entry
    query_entry: Entry
    norm: bool
    lexical: bool
    own_weights: OwnWeights | None = None
    query_tokenizer: TextTokenizer | None = None
    query_activation: Activation | None = None
    query_gate: StaticTower | None = None
    model: str = ""
    revision: str = ""
    digest: str = ""


def load_text(name_or_folder: str | os.PathLike[str], options: LoadOptions) -> TextParts:
    """The parts of a text encoder, see `SparseEncoder.from_pretrained`.

    Raises:
        ConfigError: The folder, a file in it, or an option is impossible.
        MissingExtraError: A hub id needs `huggingface_hub`.
    """
    folder, revision = locate_model(name_or_folder, options.revision)
    with understood(folder):
        return _load_text(folder, os.fspath(name_or_folder), revision, options)


def _load_text(folder: Path, model: str, revision: str, options: LoadOptions) -> TextParts:
    plan = _with_options(read_plan(folder), options)
    files = (folder / OWN_FILE, folder / TEXT_PART / OWN_FILE)
    own = next((file for file in files if file.is_file()), None)
    if own is not None:
        check_digests(own)
    _refuse_deep(plan)
    tokenizer = find_tokenizer(
        tuple(dict.fromkeys((plan.tokenizer or plan.folder, plan.folder, folder))),
        options.tokenizer,
        hub_id=plan.tokenizer_id,
        lower_case=plan.lower_case,
    )
    vocabulary = Vocabulary.from_tokenizer(tokenizer, plan.vocabulary)
    if options.is_described and has_stored_towers(plan):
        runtime: Literal["onnx", "torch"] = "onnx"
    else:
        asked = options.asked_runtime()
        runtime = runtime_of(plan, vocabulary, asked, options.obstacles(), options.device)
    sides = load_sides(plan, tokenizer, vocabulary, runtime, options)
    digest = sides.digest
    if own is not None and runtime == "onnx":
        digest = known_digest(own, named_weights(sides.document, sides.query, plan.own_weights))
    for words in {id(words): words for words in (tokenizer, sides.query_tokenizer)}.values():
        if options.special_tokens_as_text is not None and words is not None:
            words.special_as_text = options.special_tokens_as_text
    query_k = options.k if options.query_k == "checkpoint" else options.query_k
    query_length = options.query_max_length
    if query_length is None:
        query_length = options.max_length
    return TextParts(
        document_tower=sides.document,
        query_tower=sides.query,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        activation=plan.activation,  # type: ignore[arg-type] # checked by the encoder
        document_entry=_entry(plan.document_entry, sides.document, options.k, options.max_length),
        query_entry=_entry(plan.query_entry, sides.query, query_k, query_length),
        norm=plan.norm,
        lexical=plan.lexical,
        own_weights=plan.own_weights,
        query_tokenizer=sides.query_tokenizer,
        query_activation=plan.query_activation,  # type: ignore[arg-type]
        query_gate=sides.query_gate,
        model=model,
        revision=revision,
        digest=digest,
    )


def _refuse_deep(plan: Plan) -> None:
    """Refuses more layers than there are weights, before a library is imported to build them."""
    for where in (plan.document, plan.query):
        if isinstance(where, TowerPlan) and not where.adapter:
            for layers in map(where.config.get, _LAYERS):
                if isinstance(layers, int) and layers > MANY_LAYERS:
                    check_layers(layers, Checkpoint(where.folder or plan.folder))


def _with_options(plan: Plan, options: LoadOptions) -> Plan:
    if options.head not in (None, plan.head):
        if options.head != "vdr" or plan.layout != "Hugging Face":
            raise ConfigError(
                f"`head` must be {plan.head!r} for this folder, which holds the weights of that "
                f"head, got {options.head!r}; a new 'vdr' head starts from a Hugging Face model."
            )
        if plan.family is None or plan.query is not None:
            raise ConfigError(
                "a new 'vdr' head starts from a BERT, DistilBERT or RoBERTa for both sides, got "
                f"{plan.document.config.get('model_type')!r} or static query weights."
            )
        plan = replace(
            plan,
            head="vdr",
            fresh=True,
            activation="elu1p",
            vocabulary="from_999" if plan.family.name == "bert" else "all",
            document_entry=replace(plan.document_entry, k=VDR_K),
            query_entry=replace(plan.query_entry, k=VDR_K),
        )
    return replace(
        plan,
        vocabulary=options.vocabulary or plan.vocabulary,
        activation=options.activation or plan.activation,
        lexical=plan.lexical if options.lexical is None else options.lexical,
        own_weights=plan.own_weights
        if options.own_weights is None
        else options.own_weights or None,
    )


def _entry(
    entry: Entry,
    tower: TextTower,
    k: int | FromCheckpoint | None,
    max_length: int | None,
) -> Entry:
    most = tower.config.max_length
    length = min(entry.max_length or most, most) if max_length is None else max_length
    return replace(entry, max_length=length, k=entry.k if k == "checkpoint" else k)
