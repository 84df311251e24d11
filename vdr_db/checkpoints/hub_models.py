"""Models of transformers out of folders: their configs checked key by key, their weights complete.

No code of a folder is ever run: what transformers itself has no class for is refused, and names of
classes that live in a folder (`auto_map`) count for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import getsource
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.keys import ADAPTER, HARMLESS_IN_CONFIGS
from vdr_db.checkpoints.plan import TowerPlan
from vdr_db.checkpoints.weights import MANY_LAYERS, Checkpoint, check_layers
from vdr_db.errors import ConfigError, MissingExtraError, require
from vdr_db.towers.families import TOLERATED

__all__ = ["load_hub_model"]

_BIDIRECTIONAL = ("bidirectional", "use_bidirectional_attention", "is_causal")
_RENAMED = {"new": "gte"}
"""Model type of remote code -> the class transformers has for the same computation."""
_NEW_KEYS = {
    "layer_norm_type": ("layer_norm",),
    "logn_attention_scale": (False,),
    "logn_attention_clip1": (False,),
    "pack_qkv": (True,),
    "position_embedding_type": ("rope",),
}
"""Keys of `new` that its native class has no word for -> what they must say."""


def load_hub_model(where: TowerPlan, folder: Path) -> nn.Module:
    """A masked language model or a decoder with its weights, float32 on the CPU, in evaluation.

    Args:
        where: What a folder says about it.
        folder: The folder; that of the adapter where there is one, which is merged.

    Raises:
        ConfigError: transformers has no class for it, a key of its config is unknown, or weights
            are missing or left over.
        MissingExtraError: An adapter needs `peft`.
    """
    transformers = require("transformers", "torch")
    base = folder
    if where.adapter:
        base = _base_of_adapter(folder)
    settings = dict(settings_of(base / "config.json"))
    theta_factor = _translate(base / "config.json", settings)
    config = _config(where, base / "config.json", settings)
    if where.bidirectional:
        config.is_causal = False
    kind = "AutoModelForCausalLM" if where.is_decoder else "AutoModelForMaskedLM"
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MANY_LAYERS:  # layers may share weights
        check_layers(layers, Checkpoint(base))
    with _quiet():
        try:
            model, report = getattr(transformers, kind).from_pretrained(
                str(base),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except Exception as error:  # whatever transformers raises, the folder is what is wrong
            raise ConfigError(
                f"{base} must hold a model that transformers has a class for, but "
                f"{_first_line(error)}; a model with code of its own is not run: encode it with "
                "sentence-transformers."
            ) from error
    _refuse_incomplete(base, model, report)
    if theta_factor is not None:
        _scale_rope(model, *theta_factor)
    if where.adapter:
        model = _merged(model, folder)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()  # type: ignore[no-any-return]


def _config(where: TowerPlan, file: Path, settings: Mapping[str, Any]) -> Any:
    """The config as transformers reads it, with every key accounted for."""
    from transformers import CONFIG_MAPPING

    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"`model_type` in {file} must be one that transformers has a class for, got "
            f"{model_type!r}; code that comes with a model is never run."
        )
    kind = CONFIG_MAPPING[model_type]
    given = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        config = kind.from_dict(given)
        fields = set(kind().to_dict()) | set(kind.attribute_map) | HARMLESS_IN_CONFIGS
        fields |= {"model_type", *getattr(kind, "__dataclass_fields__", {})}
        fields |= {*_BIDIRECTIONAL} if where.is_decoder else set()
        sources = "".join(map(getsource, kind.__mro__[:-1]))
        for key in sorted(given.keys() - fields):
            if f'"{key}"' in sources:
                continue  # an older name that the class reads
            raise ConfigError(
                f"{file} must hold known keys only, got {key!r}; whether it changes vectors "
                "cannot be told, so delete it in a copy of the folder if it does not."
            )
    except ConfigError:
        raise
    except Exception as error:  # strict configs raise many kinds
        raise ConfigError(
            f"{file} must be a config of a {model_type} model, but {_first_line(error)}; "
            "fetch it again."
        ) from error
    if config.to_dict().get("quantization_config"):
        raise ConfigError(
            f"{file} must describe weights as floats, got a `quantization_config`; take the "
            "model before it was quantized."
        )
    return config


def _translate(file: Path, settings: dict[str, Any]) -> tuple[float, float] | None:
    """Rewrites a config of remote code for its native class.

    Returns:
        Base and factor of a rotary scaling that the native class does not know, or None.
    """
    name = _RENAMED.get(settings.get("model_type", ""))
    if name is None:
        return None
    settings["model_type"] = name
    for key, allowed in _NEW_KEYS.items():
        value = settings.pop(key, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"`{key}` in {file} must be {allowed[0]!r}, got {value!r}; the native class "
                "computes nothing else."
            )
    theta = float(settings.pop("rope_theta", 10000.0))
    scaling = settings.pop("rope_scaling", None)
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if not scaling:
        return None
    if scaling.get("type") != "ntk" or set(scaling) - {"type", "factor"}:
        raise ConfigError(
            f"`rope_scaling` in {file} must be null or of type 'ntk' with a factor, got "
            f"{scaling!r}; no published model has another."
        )
    return theta, float(scaling["factor"])


def _scale_rope(model: nn.Module, theta: float, factor: float) -> None:
    """Fixed NTK scaling as `new` models have it; source: kexue.fm/archives/9706."""
    for part in model.modules():
        known = getattr(part, "inv_freq", None)
        if isinstance(known, torch.Tensor):
            size = 2 * known.numel()
            steps = torch.arange(0, size, 2, dtype=torch.float32) / size
            scaled = 1.0 / ((theta * factor) ** steps) / factor ** (2 / size)
            part.inv_freq, part.original_inv_freq = scaled, scaled.clone()


def _refuse_incomplete(folder: Path, model: Any, report: Mapping[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    left = sorted(name for name in report.get("unexpected_keys") or () if not _spare(name))
    misshapen = sorted(str(name) for name in report.get("mismatched_keys") or ())
    head = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
    if head and len(head) == len(missing):
        raise ConfigError(
            f"{folder} must hold a masked language model, got a {model.config.model_type} body "
            f"without its head (no {head[0]}): it makes dense vectors, which have no sparse form."
        )
    if missing or left or misshapen:
        said = [f"lack {', '.join(missing[:20])}"] if missing else []
        said += [f"hold {', '.join(left[:20])} besides"] if left else []
        said += [f"have other shapes for {', '.join(misshapen[:20])}"] if misshapen else []
        raise ConfigError(
            f"the weights in {folder} do not fit its config.json: they {' and '.join(said)}; "
            "fetch the model again."
        )


def _spare(name: str) -> bool:
    """Weights that no vector needs: poolers, counters, heads of pre-training beside the MLM's."""
    return bool(TOLERATED.search(name)) or name.endswith((".inv_freq", ".masked_bias", ".bias_ids"))


def _base_of_adapter(folder: Path) -> Path:
    from vdr_db.checkpoints.locate import locate_model

    file = folder / "adapter_config.json"
    settings = settings_of(file)
    ADAPTER.check(file, settings)
    name = settings.get("base_model_name_or_path")
    if settings.get("peft_type") != "LORA" or not isinstance(name, str):
        raise ConfigError(
            f"{file} must describe a LORA adapter of a named base model, got peft_type="
            f"{settings.get('peft_type')!r} of {name!r}; merge it with `peft` and save the model."
        )
    return locate_model(name, settings.get("revision"))[0]


def _merged(model: nn.Module, folder: Path) -> nn.Module:
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{folder} holds a LoRA adapter, which `peft` merges; run: pip install "
            "'vdr-db[adapters]'."
        ) from error
    try:
        with _quiet():
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[no-any-return]
    except Exception as error:  # many kinds, all of them about the folder
        raise ConfigError(
            f"the adapter in {folder} cannot be merged: {_first_line(error)}; fetch it again."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of weights: what is wrong is raised here."""
    from transformers.utils import logging as their

    before = their.get_verbosity()
    bars = their.is_progress_bar_enabled()
    their.set_verbosity(logging.CRITICAL)
    their.disable_progress_bar()
    try:
        yield
    finally:
        their.set_verbosity(before)
        if bars:
            their.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
