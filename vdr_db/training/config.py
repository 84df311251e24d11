"""Settings of a training run out of YAML, every key checked.

A file has the sections of `TrainConfig`; each key is a field of the section's class, with that
field's default when left out. Paths are relative to the file. Presets: `vdr_db/training/presets/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from vdr_db.errors import ConfigError, require
from vdr_db.training.settings import TrainConfig

__all__ = ["build_config", "load_config", "preset_folder"]


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Settings out of a YAML file or the name of a preset.

    Args:
        path: A file, or the name of a file in `presets/` without its ending.
        overrides: `{"run.steps": "300"}`: values as YAML, by dotted key.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, or a value is impossible.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = require("yaml", "train")
    file = Path(path)
    preset = preset_folder() / f"{path}.yaml"
    is_preset = not file.exists() and preset.is_file()
    if is_preset:
        file = preset
    if not file.is_file():
        known = ", ".join(sorted(item.stem for item in preset_folder().glob("*.yaml")))
        raise ConfigError(f"{path} must be a YAML file or one of the presets {known}.")
    try:
        settings = yaml.safe_load(file.read_text("utf-8"))
        values = {key: yaml.safe_load(text) for key, text in (overrides or {}).items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} must be YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} must hold sections such as `model:` and `data:`, got none.")
    for key, value in values.items():
        _set(settings, key.split("."), value)
    config = build_config(settings)
    return config if is_preset else _resolved(config, file.parent)


def build_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Settings out of plain mappings.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type; the message names it.
    """
    built: TrainConfig = _build(TrainConfig, settings, "")
    return built


def preset_folder() -> Path:
    """Where the presets are."""
    return Path(__file__).parent / "presets"


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"`{'.'.join(keys)}` must name a key of a section.")
        settings = inner
    settings[keys[-1]] = value


def _resolved(config: TrainConfig, folder: Path) -> TrainConfig:
    """Relative paths of files that exist beside the configuration, made absolute."""

    def place(path: str) -> str:
        beside = folder / path
        return str(beside.resolve()) if path and beside.exists() else path

    files = tuple(dataclasses.replace(item, path=place(item.path)) for item in config.data.train)
    teachers = tuple(dataclasses.replace(item, path=place(item.path)) for item in config.teachers)
    image = config.image
    if image is not None:
        image = dataclasses.replace(image, start=place(image.start), stem=place(image.stem))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, start=place(config.model.start)),
        data=dataclasses.replace(config.data, train=files),
        teachers=teachers,
        image=image,
        evaluation=dataclasses.replace(config.evaluation, folder=place(config.evaluation.folder)),
    )


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of a type out of plain YAML."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{where}` must be a section with keys, got {value!r}.")
        hints, prefix = typing.get_type_hints(kind), f"{where}." if where else ""
        for key in sorted(set(value) - set(hints)):
            raise ConfigError(f"unknown key `{prefix}{key}`; expected some of {', '.join(hints)}.")
        return kind(**{key: _build(hints[key], item, prefix + key) for key, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _build(next(item for item in arguments if item is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"`{where}` must be one of {list(arguments)}, got {value!r}.")
        return value
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else None
        inner = [arguments[0]] * len(items or ()) if arguments[-1] is ... else list(arguments)
        if items is None or len(items) != len(inner):
            raise ConfigError(
                f"`{where}` must be a list of {len(inner) or 'items'}, got {value!r}."
            )
        return tuple(
            _build(part, item, f"{where}[{i}]")
            for i, (part, item) in enumerate(zip(inner, items, strict=True))
        )
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    # YAML 1.1 reads 2e-5 as a text, since it lacks the point.
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, (int, float)) and not is_bool:
        return float(value)
    if kind is int and isinstance(value, int) and not is_bool:
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ConfigError(f"`{where}` must be of type {kind.__name__}, got {value!r}.")
