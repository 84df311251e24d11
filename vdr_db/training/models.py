"""The encoder a run trains: loaded, set up as configured, and saved for use."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vdr_db.checkpoints.assets import fetch, is_known
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.training.settings import ModelConfig
from vdr_db.training.vectors import Side

__all__ = [
    "DTYPES",
    "MODEL_FOLDER",
    "in_dtype",
    "load_start",
    "load_student",
    "make_sides",
    "save_model",
    "set_dropout",
    "start_folder",
    "trainable",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL_FOLDER = "model"
"""In the output folder of a run."""


def start_folder(start: str) -> str:
    """Folder or hub id behind a `start`; a name of `assets` is fetched on first use.

    Raises:
        ConfigError: It is empty, or the model cannot be had.
    """
    if not start:
        raise ConfigError("`model.start` must name a folder, a hub id or an asset, got none.")
    return str(fetch(start)) if is_known(start) and not Path(start).is_dir() else start


def load_start(
    settings: ModelConfig, device: torch.device, *, own_weights: bool = False
) -> SparseEncoder:
    """The first weights, float32, with k and lengths they will be used with.

    Own weights are left out unless asked for: no text side learns beside them.
    """
    return SparseEncoder.from_pretrained(
        start_folder(settings.start),
        device=device,
        head=settings.head,
        activation=settings.activation,
        vocabulary=settings.vocabulary,
        k=settings.k,
        query_k=settings.query_k,
        max_length=settings.encode_max_length,
        lexical=False,
        own_weights=None if own_weights else False,
        runtime="torch",
    )


def load_student(settings: ModelConfig, device: torch.device) -> SparseEncoder:
    """The encoder to train, with one tower or two as configured.

    Raises:
        ConfigError: The checkpoint cannot be loaded as configured.
    """
    encoder = load_start(settings, device)
    if not settings.shared and encoder.document_tower.body is encoder.query_tower.body:
        encoder.query_tower = copy.deepcopy(encoder.document_tower)
    if settings.shared and not encoder.is_shared:
        raise ConfigError(
            "`model.shared` must be false for this checkpoint, which holds two towers; set it."
        )
    return encoder


def make_sides(encoder: SparseEncoder, settings: ModelConfig) -> tuple[Side, Side]:
    """Queries and documents as training encodes them.

    Raises:
        ConfigError: A length is beyond the model's positions, or leaves no room for a token.
    """
    query = Side.of(encoder, "query", lexical=settings.lexical)
    document = Side.of(encoder, "document", lexical=settings.lexical)
    lengths = (settings.query_max_length, settings.max_length)
    sides = []
    for side, length in zip((query, document), lengths, strict=True):
        most = side.tower.body.config.max_length
        if not side.encoder.tokenizer.extra_length < length <= most:
            raise ConfigError(
                f"maximal lengths of training must be at most the model's {most} positions and "
                f"leave room for a token, got {length}."
            )
        sides.append(replace(side, frame=replace(side.frame, max_length=length)))
    return sides[0], sides[1]


def trainable(encoder: SparseEncoder, *, freeze_embeddings: bool) -> dict[str, nn.Parameter]:
    """Parameters to train, by name; those of a shared tower once."""
    towers = {"document": encoder.document_tower}
    if not encoder.is_shared:
        towers["query"] = encoder.query_tower
    parameters: dict[str, nn.Parameter] = {}
    for side, tower in towers.items():
        for name, parameter in tower.named_parameters():
            frozen = freeze_embeddings and name.endswith("word.weight")
            parameter.requires_grad_(not frozen)
            if not frozen:
                parameters[f"{side}.{name}"] = parameter
    return parameters


def set_dropout(encoder: SparseEncoder, rate: float | None) -> None:
    """Gives the bodies another dropout; None leaves the checkpoint's.

    Raises:
        ConfigError: It is not in [0, 1).
    """
    if rate is None:
        return
    if not 0 <= rate < 1:
        raise ConfigError(f"`run.dropout` must be in [0, 1), got {rate}.")
    for tower in {id(t): t for t in (encoder.document_tower, encoder.query_tower)}.values():
        for layer in tower.body.layers:
            for name in ("dropout", "attention_dropout"):
                setattr(layer, name, rate)
        tower.body.config = replace(tower.body.config, hidden_dropout=rate, attention_dropout=rate)


def in_dtype(encoder: SparseEncoder, dtype: torch.dtype) -> SparseEncoder:
    """An encoder with weights of another dtype; the given one stays as it is."""
    # Copied together, so that what both towers share they still share.
    document, query = copy.deepcopy((encoder.document_tower, encoder.query_tower))
    smaller = copy.copy(encoder)
    smaller.document_tower, smaller.query_tower = document.to(dtype), query.to(dtype)
    return smaller


def save_model(encoder: SparseEncoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes the encoder with weights of another dtype, the encoder itself stays as it is."""
    (encoder if dtype == encoder.dtype else in_dtype(encoder, dtype)).save_pretrained(folder)
