"""Text encoders of every layout in `layouts`: from a folder or the hub to parts, and back.

Nothing here makes an encoder: `load_text` hands out the parts, `SparseEncoder` is built of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.checkpoints.folders import settings_of, written_folder
from vdr_db.checkpoints.graphs import (
    Runtime,
    chosen_runtime,
    folder_obstacles,
    open_text_towers,
    trainable,
    write_text_graphs,
)
from vdr_db.checkpoints.layouts import OWN_FILE, OWN_FORMAT, read_plan
from vdr_db.checkpoints.locate import find_tokenizer, locate_model
from vdr_db.checkpoints.plan import GRAPHS, Entry, FromCheckpoint, Plan, tower_names
from vdr_db.checkpoints.weights import SAFETENSORS, save_weights
from vdr_db.errors import ConfigError
from vdr_db.kernels import Activation
from vdr_db.text.tokenization import AnyTokenizer, TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import FAMILIES
from vdr_db.towers.onnx import OnnxTextTower

if TYPE_CHECKING:
    import torch

    from vdr_db.towers.text import Tower

__all__ = ["LoadOptions", "TextParts", "add_graphs", "load_text", "save_text"]

VDR_K = 768
"""Dimensions a new VDR encoder keeps, as the published ones do."""


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of `SparseEncoder.from_pretrained`, which tells what they mean."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    k: int | FromCheckpoint | None = "checkpoint"
    query_k: int | FromCheckpoint | None = "checkpoint"
    max_length: int | None = None
    query_max_length: int | None = None
    lexical: bool | None = None
    activation: Activation | None = None
    head: str | None = None
    vocabulary: str | None = None
    tokenizer: AnyTokenizer | None = None
    revision: str | None = None
    runtime: Runtime = "auto"
    threads: int | None = None
    needs_torch: Mapping[str, bool] = field(default_factory=dict)

    def obstacles(self) -> dict[str, str]:
        """Options that ONNX Runtime cannot follow: option -> the rest of a sentence."""
        found = {}
        if str(self.device or "cpu") != "cpu":
            found["`device`"] = f"must be None or 'cpu', got {self.device!r}"
        if str(self.dtype or "float32").removeprefix("torch.") != "float32":
            found["`dtype`"] = f"must be None or 'float32', got {self.dtype!r}"
        asked = [name for name, is_set in self.needs_torch.items() if is_set]
        return {**found, **dict.fromkeys(asked, "must be left alone")}


@dataclass(frozen=True)
class TextParts:
    """What a `SparseEncoder` is made of, by the names of its constructor.

    Attributes:
        document_tower: For documents, with its weights, on the device and in the dtype asked for.
        query_tower: For queries; the same object when shared.
        tokenizer: Of both towers.
        vocabulary: Of both heads.
        activation: Turns scores into weights.
        document_entry: Maximal length, k and prompt of documents.
        query_entry: Maximal length, k and prompt of queries.
        norm: Whether vectors have L2 norm 1 before selection.
        lexical: Whether a text's own tokens are always kept.
        model: Name or folder it came from.
        revision: Revision on the hub.
        digest: Of the weights before they were rounded to the dtype; `""` where they were not.
    """

    document_tower: Tower | OnnxTextTower
    query_tower: Tower | OnnxTextTower
    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    activation: Activation
    document_entry: Entry
    query_entry: Entry
    norm: bool
    lexical: bool
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
    plan = _with_options(read_plan(folder), options)
    tokenizer = find_tokenizer(
        (plan.folder, folder),
        options.tokenizer,
        hub_id=plan.tokenizer_id,
        lower_case=plan.lower_case,
    )
    vocabulary = Vocabulary.from_tokenizer(tokenizer, plan.vocabulary)
    files = [plan.folder / SAFETENSORS]
    obstacles = {
        **options.obstacles(),
        **({"`head`": "starts without weights"} if plan.fresh else {}),
        **folder_obstacles(plan.graphs, files, vocabulary.kind),
    }
    runtime = chosen_runtime(options.runtime, obstacles, device=options.device, folder=folder)
    document: Tower | OnnxTextTower
    query: Tower | OnnxTextTower
    digest = ""
    if runtime == "onnx":
        document, query = open_text_towers(plan, vocabulary, options.threads)
    else:
        from vdr_db.checkpoints.text_towers import build_towers

        document, query, digest = build_towers(plan, vocabulary, options.device, options.dtype)
    query_k = options.k if options.query_k == "checkpoint" else options.query_k
    query_length = options.query_max_length
    if query_length is None:
        query_length = options.max_length
    return TextParts(
        document_tower=document,
        query_tower=query,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        activation=plan.activation,  # type: ignore[arg-type] # checked by the encoder
        document_entry=_entry(plan.document_entry, document, options.k, options.max_length),
        query_entry=_entry(plan.query_entry, query, query_k, query_length),
        norm=plan.norm,
        lexical=plan.lexical,
        model=os.fspath(name_or_folder),
        revision=revision,
        digest=digest,
    )


def save_text(parts: TextParts, folder: str | os.PathLike[str]) -> None:
    """Writes a text encoder as a folder that `load_text` reads back, all of it or nothing.

    The folder is written beside its place and then renamed. An encoder saved there before is
    replaced; anything else is left alone. Weights keep their usual names, so a shared `mlm` encoder
    also opens with `transformers.AutoModelForMaskedLM`.

    Args:
        parts: What to save.
        folder: Where to.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    is_shared = parts.document_tower is parts.query_tower
    towers = {"document": trainable(parts.document_tower)}
    if not is_shared:
        towers["query"] = trainable(parts.query_tower)
    head = parts.document_tower.head_name
    tensors: dict[str, torch.Tensor] = {}
    prefixes: dict[str, tuple[str, str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for side, tower in towers.items():
        family = FAMILIES[tower.config.family]
        outer = "" if is_shared else f"{side}."
        prefixes[side] = (outer + (family.body_prefix if head == "mlm" else "body."), outer)
        configs[side] = family.to_hf_config(tower.config, masked_lm=head == "mlm")
        configs[side]["tie_word_embeddings"] = "head.decoder.weight" not in tower.state_dict()
        names = tower_names(family, tower.config.layers, head, *prefixes[side])
        for ours, tensor in tower.named_parameters():
            for theirs in names[ours]:  # a bias goes by two names, and versions differ in which
                tensors[theirs] = tensor if theirs == names[ours][0] else tensor.clone()
    settings: dict[str, Any] = {
        "format": OWN_FORMAT,
        "head": head,
        "activation": parts.activation,
        "vocabulary": parts.vocabulary.kind,
        "norm": parts.norm,
        "lexical": parts.lexical,
        "shared": is_shared,
    }
    for side, entry in (("document", parts.document_entry), ("query", parts.query_entry)):
        body, outer = prefixes.get(side, prefixes["document"])
        settings[side] = {
            "max_length": entry.max_length,
            "k": entry.k,
            "prompt": entry.prompt,
            "body": body,
            "head": outer,
        }
    if not is_shared:
        settings["query"]["config"] = configs["query"]  # config.json is that of the documents
    with written_folder(folder, OWN_FILE) as fresh:
        save_weights(tensors, fresh / SAFETENSORS)
        parts.tokenizer.save(fresh)
        for name, content in (("config.json", configs["document"]), (OWN_FILE, settings)):
            written = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (fresh / name).write_text(written, "utf-8")


def add_graphs(folder: str | os.PathLike[str]) -> None:
    """Writes ONNX graphs into a folder that `save_text` wrote, beside its weights.

    Raises:
        ConfigError: The folder is of another kind, or a part of the model has no graph.
        MissingExtraError: `onnx` is not installed.
    """
    plan = read_plan(Path(folder))
    file = plan.folder / OWN_FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder} must be a folder that `save_pretrained` wrote, got the layout "
            f"{plan.layout}; export it to a folder of its own."
        )
    tokenizer = find_tokenizer((plan.folder,), None)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, plan.vocabulary)
    settings = {**settings_of(file), GRAPHS: write_text_graphs(plan, vocabulary)}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _with_options(plan: Plan, options: LoadOptions) -> Plan:
    if options.head not in (None, plan.head):
        if options.head != "vdr" or plan.layout != "Hugging Face":
            raise ConfigError(
                f"`head` must be {plan.head!r} for this folder, which holds the weights of that "
                f"head, got {options.head!r}; a new 'vdr' head starts from a Hugging Face model."
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
    )


def _entry(
    entry: Entry,
    tower: Tower | OnnxTextTower,
    k: int | FromCheckpoint | None,
    max_length: int | None,
) -> Entry:
    most = tower.config.max_length
    length = min(entry.max_length or most, most) if max_length is None else max_length
    return replace(entry, max_length=length, k=entry.k if k == "checkpoint" else k)
