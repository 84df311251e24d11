"""Kinds of model folders, as data: how each is recognised and what its files say.

A reader turns the JSON files of a folder into one `Plan`; `text` builds any plan in the same way.
`LAYOUTS` is tried in order, the first that recognises the folder reads it:

| layout                | recognised by                               | head, activation      |
|-----------------------|---------------------------------------------|-----------------------|
| vdr_db                | `vdr_db.json`                               | as saved              |
| vdr_db, cross-modal   | `vdr_db_cross_modal.json`                   | of its text side      |
| sentence-transformers | `modules.json`                              | by its modules        |
| VDR upstream          | `encoder_q` or `encoder_p` in `config.json` | `vdr`, `elu1p`        |
| Hugging Face          | any other `config.json`                     | `mlm`, `log1p_relu`   |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdr_db.checkpoints.folders import settings_of, understood
from vdr_db.checkpoints.modules import read_sentence_transformers, with_idf
from vdr_db.checkpoints.plan import (
    GRAPHS,
    Entry,
    Layout,
    Plan,
    StaticPlan,
    TowerPlan,
    model_max_length,
)
from vdr_db.checkpoints.tower_plans import SPARSE_LINEAR, tower_plan
from vdr_db.checkpoints.upstream import is_upstream, read_upstream
from vdr_db.errors import ConfigError
from vdr_db.text.own_weights import OwnWeights
from vdr_db.towers.families import find_family

__all__ = [
    "CROSS_MODAL_FILE",
    "IMAGE_FILE",
    "IMAGE_PART",
    "LAYOUTS",
    "OWN_FILE",
    "OWN_FORMAT",
    "OWN_WEIGHTS_FORMAT",
    "TEXT_PART",
    "read_plan",
]

OWN_FILE = "vdr_db.json"
OWN_FORMAT = 2
OWN_WEIGHTS_FORMAT = 3
"""Of folders with own weights, which older versions would leave out."""
IMAGE_FILE = "vdr_db_image.json"
CROSS_MODAL_FILE = "vdr_db_cross_modal.json"
TEXT_PART, IMAGE_PART = "text", "image"
"""Folders of the two encoders inside of that of a `CrossModalEncoder`."""


def read_plan(folder: Path) -> Plan:
    """What a model folder says about its encoder.

    Raises:
        ConfigError: The folder is of no known kind, or a file is missing, damaged or describes
            something this library does not compute.
    """
    for layout in LAYOUTS:
        if layout.recognises(folder):
            with understood(folder):
                return layout.read(folder)
    if (folder / IMAGE_FILE).is_file():
        raise ConfigError(
            f"{folder} must hold a text encoder, got an image encoder; load it with "
            "ImageEncoder.from_pretrained."
        )
    raise ConfigError(
        f"{folder} must be a model folder, which holds a config.json, got none; fetch the whole "
        "model, or save it with `save_pretrained`."
    )


# Ours


def _read_own(folder: Path) -> Plan:
    file = folder / OWN_FILE
    saved = settings_of(file)
    if saved.get("format") not in (1, OWN_FORMAT, OWN_WEIGHTS_FORMAT):
        raise ConfigError(
            f"{file} must have format 1 to {OWN_WEIGHTS_FORMAT}, got {saved.get('format')!r}; "
            "install the version of vdr-db that wrote it."
        )
    try:
        query, document = saved["query"], saved["document"]
        place = folder / document.get("folder", "")
        query_place = folder / query.get("folder", "")
        gate, numbers = query.get("gate"), saved.get("own_weights")
        return Plan(
            folder=place,
            layout="vdr_db",
            head=saved["head"],
            activation=saved["activation"],
            vocabulary=saved["vocabulary"],
            document=_own_part(place, document),
            query=None if saved["shared"] else _own_query(query_place, query),
            document_entry=Entry(document["max_length"], document["k"], document["prompt"]),
            query_entry=Entry(query["max_length"], query["k"], query["prompt"]),
            query_activation=saved.get("query_activation"),
            query_gate=None if gate is None else StaticPlan(folder / gate),
            query_tokenizer=query_place if query.get("tokenizer") else None,
            norm=saved["norm"],
            lexical=saved["lexical"],
            own_weights=None if numbers is None else OwnWeights.read(folder, numbers),
            graphs=saved.get(GRAPHS),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} must hold the settings `save_pretrained` writes, but {error!r}; "
            "save the encoder anew."
        ) from error


def _own_query(folder: Path, saved: Mapping[str, Any]) -> TowerPlan | StaticPlan:
    return StaticPlan(folder) if saved.get("static") else _own_part(folder, saved)


def _own_part(folder: Path, saved: Mapping[str, Any]) -> TowerPlan:
    config = saved.get("config") or settings_of(folder / "config.json")
    if "decoder" in saved:
        both = saved["decoder"] and config.get("is_causal") is False
        return TowerPlan(config, folder=folder, is_decoder=saved["decoder"], bidirectional=both)
    return TowerPlan(
        config,
        saved["body"],
        saved["head"],
        folder=folder,
        family=find_family(config),
        dropped=saved.get("dropped"),
    )


# Hugging Face masked language models


def _read_hugging_face(folder: Path) -> Plan:
    _refuse_known(folder)
    is_weigher = (folder / SPARSE_LINEAR).is_file() or _is_unicoil(folder)
    head = "token_weights" if is_weigher else "mlm"
    tower = tower_plan(folder, head=head)
    if _is_unicoil(folder):
        tower = replace(tower, body_prefix="bert.")
    entry = Entry(max_length=model_max_length(folder))
    plan = Plan(
        folder=folder,
        layout="Hugging Face",
        head=head,
        activation="none" if is_weigher else "log1p_relu",
        vocabulary="all",
        document=tower,
        document_entry=entry,
        query_entry=entry,
    )
    return with_idf(folder, plan)


def _is_unicoil(folder: Path) -> bool:
    file = folder / "config.json"
    named = settings_of(file).get("architectures") if file.is_file() else None
    return isinstance(named, list) and any("unicoil" in str(name).lower() for name in named)


def _refuse_known(folder: Path) -> None:
    """Says what is wrong with published folders that cannot be had here, by their names."""
    if (folder / "stopwords.txt").is_file() and not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} holds BM42, whose weights are attentions to words and not of a vocabulary; "
            "encode it with fastembed."
        )
    if list(folder.glob("*minicoil*")):
        raise ConfigError(
            f"{folder} holds miniCOIL, whose dimensions are meanings of words and not tokens; "
            "encode it with fastembed."
        )


LAYOUTS = (
    Layout("vdr_db", lambda folder: (folder / OWN_FILE).is_file(), _read_own),
    Layout(
        "vdr_db, cross-modal",
        lambda folder: (folder / CROSS_MODAL_FILE).is_file(),
        lambda folder: read_plan(folder / TEXT_PART),
    ),
    Layout(
        "sentence-transformers",
        lambda folder: (folder / "modules.json").is_file(),
        read_sentence_transformers,
    ),
    Layout("VDR upstream", is_upstream, read_upstream),
    Layout("Hugging Face", lambda folder: (folder / "config.json").is_file(), _read_hugging_face),
)
