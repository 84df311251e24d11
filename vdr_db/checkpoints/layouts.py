"""Kinds of model folders, as data: how each is recognised and what its files say.

A reader turns the JSON files of a folder into one `Plan`; `text` builds any plan in the same way.
`LAYOUTS` is tried in order, the first that recognises the folder reads it:

| layout                | recognised by                               | head, activation      |
|-----------------------|---------------------------------------------|-----------------------|
| vdr_db                | `vdr_db.json`                               | as saved              |
| vdr_db, cross-modal   | `vdr_db_cross_modal.json`                   | of its text side      |
| sentence-transformers | `modules.json`                              | `mlm`, by its pooling |
| VDR upstream          | `encoder_q` or `encoder_p` in `config.json` | `vdr`, `elu1p`        |
| Hugging Face          | any other `config.json`                     | `mlm`, `log1p_relu`   |
"""

from __future__ import annotations

import json
from pathlib import Path

from vdr_db.checkpoints.assets import fetch
from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.plan import Entry, Layout, Plan, TowerPlan, model_max_length
from vdr_db.checkpoints.upstream import is_upstream, read_upstream
from vdr_db.errors import ConfigError
from vdr_db.towers.families import find_family

__all__ = [
    "CROSS_MODAL_FILE",
    "IMAGE_FILE",
    "IMAGE_PART",
    "LAYOUTS",
    "OWN_FILE",
    "OWN_FORMAT",
    "TEXT_PART",
    "read_plan",
]

OWN_FILE = "vdr_db.json"
OWN_FORMAT = 1
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
    saved = settings_of(folder / OWN_FILE)
    if saved.get("format") != OWN_FORMAT:
        raise ConfigError(
            f"{folder / OWN_FILE} must have format {OWN_FORMAT}, got {saved.get('format')!r}; "
            "install the version of vdr-db that wrote it."
        )
    config = settings_of(folder / "config.json")
    try:
        query = saved["query"]
        document = saved["document"]
        # Weights and tokenizer may be those of a model known by name, so that they lie there once.
        lender = saved.get("weights_of")
        return Plan(
            folder=folder if lender is None else fetch(lender),
            ignored=() if lender is None else ("document.", "query."),
            layout="vdr_db",
            family=find_family(config),
            head=saved["head"],
            activation=saved["activation"],
            vocabulary=saved["vocabulary"],
            document=TowerPlan(config, document["body"], document["head"]),
            query=(
                None
                if saved["shared"]
                else TowerPlan(query["config"], query["body"], query["head"])
            ),
            document_entry=Entry(document["max_length"], document["k"], document["prompt"]),
            query_entry=Entry(query["max_length"], query["k"], query["prompt"]),
            norm=saved["norm"],
            lexical=saved["lexical"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / OWN_FILE} must hold the settings `save_pretrained` writes, but {error!r}; "
            "save the encoder anew."
        ) from error


# sentence-transformers sparse encoders

_ST_POOLING = "SpladePooling"
_ST_TRANSFORMERS = ("MLMTransformer", "Transformer")
_ST_CONFIGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
)
# Its pooling always takes log1p after the named activation.
_ST_ACTIVATIONS = {"relu": "log1p_relu", "log1p_relu": "double_log1p_relu"}


def _read_sentence_transformers(folder: Path) -> Plan:
    file = folder / "modules.json"
    try:
        modules = json.loads(file.read_text("utf-8"))
        classes = [module["type"].rsplit(".", 1)[-1] for module in modules]
        paths = [folder / module["path"] for module in modules]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} must list modules with `type` and `path`: {error!r}; fetch it again."
        ) from error
    if len(classes) != 2 or classes[0] not in _ST_TRANSFORMERS or classes[1] != _ST_POOLING:
        raise ConfigError(
            f"{file} must name a masked language model and {_ST_POOLING}, got {classes}; "
            "other kinds of sentence-transformers models are not supported."
        )
    inner = next((settings_of(paths[0] / n) for n in _ST_CONFIGS if (paths[0] / n).is_file()), {})
    pooling = settings_of(paths[1] / "config.json")
    outer_file = folder / "config_sentence_transformers.json"
    outer = settings_of(outer_file) if outer_file.is_file() else {}
    task = inner.get("transformer_task", "fill-mask")
    if task != "fill-mask":
        raise ConfigError(
            f"the transformer in {folder} must be for 'fill-mask', got {task!r}; a model that "
            "makes dense vectors has no sparse ones."
        )
    strategy = pooling.get("pooling_strategy", "max")
    if strategy != "max":
        raise ConfigError(
            f"`pooling_strategy` in {paths[1] / 'config.json'} must be 'max', got {strategy!r}; "
            "vectors summed over tokens are not supported."
        )
    named = pooling.get("activation_function", "relu")
    if named not in _ST_ACTIVATIONS:
        raise ConfigError(
            f"`activation_function` in {paths[1] / 'config.json'} must be one of "
            f"{sorted(_ST_ACTIVATIONS)}, got {named!r}."
        )
    config = settings_of(paths[0] / "config.json")
    family = find_family(config)
    prompts = outer.get("prompts") or {}
    k = outer.get("max_active_dims")

    def entry(side: str) -> Entry:
        length = inner.get(f"{side}_length") or inner.get("max_seq_length")
        return Entry(
            length or model_max_length(paths[0], config, family), k, prompts.get(side) or ""
        )

    return Plan(
        folder=paths[0],
        layout="sentence-transformers",
        family=family,
        head="mlm",
        activation=_ST_ACTIVATIONS[named],
        vocabulary="all",
        document=TowerPlan(config, family.body_prefix, ""),
        document_entry=entry("document"),
        query_entry=entry("query"),
        lower_case=bool(inner.get("do_lower_case", False)),
    )


# Hugging Face masked language models


def _read_hugging_face(folder: Path) -> Plan:
    config = settings_of(folder / "config.json")
    family = find_family(config)
    entry = Entry(max_length=model_max_length(folder, config, family))
    return Plan(
        folder=folder,
        layout="Hugging Face",
        family=family,
        head="mlm",
        activation="log1p_relu",
        vocabulary="all",
        document=TowerPlan(config, family.body_prefix, ""),
        document_entry=entry,
        query_entry=entry,
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
        _read_sentence_transformers,
    ),
    Layout("VDR upstream", is_upstream, read_upstream),
    Layout("Hugging Face", lambda folder: (folder / "config.json").is_file(), _read_hugging_face),
)
