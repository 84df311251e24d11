"""What one folder of weights is: a body computed here, a model of transformers, a static table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.keys import BODY
from vdr_db.checkpoints.plan import StaticPlan, TowerPlan
from vdr_db.errors import ConfigError
from vdr_db.towers.families import family_of

if TYPE_CHECKING:
    from vdr_db.text.tokenization import TextTokenizer

__all__ = ["SPARSE_LINEAR", "read_static", "static_weights", "tower_plan"]

SPARSE_LINEAR = "sparse_linear.pt"
"""Head of bge-m3 that weighs a text's own tokens."""

_DECODERS = ("ForCausalLM", "Splade")


def tower_plan(folder: Path, *, head: str, task: str | None = None) -> TowerPlan:
    """Where the weights of a tower are and what computes it.

    Args:
        folder: Of the model, or of an adapter to one.
        head: `"mlm"` or `"token_weights"`.
        task: `transformer_task` of sentence-transformers; None outside of its folders.

    Raises:
        ConfigError: config.json holds a key nobody knows, or nothing computes such a model.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        decodes = settings_of(folder / "adapter_config.json").get("task_type") == "CAUSAL_LM"
        decodes = decodes if task is None else task == "text-generation"
        return TowerPlan({}, folder=folder, adapter=True, is_decoder=decodes)
    config = settings_of(file)
    family = family_of(config)
    if family is not None:
        BODY.check(file, config)
        prefix = family.body_prefix if head == "mlm" else ""
        return TowerPlan(config, prefix, "", folder=folder, family=family)
    if head != "mlm":
        raise ConfigError(
            f"`model_type` in {file} must be that of a BERT or RoBERTa for weights of a text's "
            f"own tokens, got {config.get('model_type')!r}."
        )
    named = [str(name) for name in config.get("architectures") or ()]
    decodes = task == "text-generation" or any(name.endswith(_DECODERS) for name in named)
    both = any(config.get(key) for key in ("bidirectional", "use_bidirectional_attention"))
    both = both or config.get("is_causal") is False
    if decodes and not both and task != "text-generation":
        raise ConfigError(
            f"{file} must say whether texts are read in both directions (`is_causal`: false), got "
            "a decoder without; its own code may tell, which is never run."
        )
    return TowerPlan(config, folder=folder, is_decoder=decodes, bidirectional=decodes and both)


def static_weights(folder: Path, file: Path | None = None) -> StaticPlan:
    """Where a table of static weights is; nothing is read.

    Args:
        folder: Holds it and its tokenizer.
        file: JSON of token text -> weight; None for a tensor `weight` in the folder's weights.
    """
    return StaticPlan(folder, file)


def read_static(plan: StaticPlan, tokenizer: TextTokenizer, size: int) -> npt.NDArray[np.float32]:
    """Weights by token id, `[size]` float32, as sentence-transformers reads them.

    Args:
        plan: Where they are.
        tokenizer: Of the side.
        size: Token ids there are.

    Raises:
        ConfigError: A weight is negative or not finite, or their number is not that of the tokens.
    """
    from vdr_db.checkpoints.weights import Checkpoint

    if plan.file is not None:
        weights = _by_text(settings_of(plan.file), tokenizer, size, plan.file)
    else:
        checkpoint = Checkpoint(plan.folder)
        if plan.name not in checkpoint.names:
            raise ConfigError(
                f"the weights in {plan.folder} must hold `{plan.name}`, one number for each token, "
                f"got {checkpoint.names[:3]}."
            )
        weights = checkpoint.array(plan.name)
    if weights.ndim != 1 or weights.size > size:
        raise ConfigError(
            f"static weights in {plan.folder} must be one for each of {size} tokens, got "
            f"{list(weights.shape)}; tokenizer and weights do not belong together."
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ConfigError(
            f"static weights in {plan.folder} must be finite and not negative, got "
            f"{weights[~(weights >= 0)][:3].tolist()}; a sparse vector holds positive weights only."
        )
    full = np.zeros(size, np.float32)
    full[: weights.size] = weights
    return full


def _by_text(
    said: Mapping[str, Any], tokenizer: TextTokenizer, size: int, file: Path
) -> npt.NDArray[np.float32]:
    vocabulary = tokenizer.get_vocab()
    unknown = tokenizer.settings.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, Mapping) else unknown
    weights = np.zeros(size, np.float32)
    for token, weight in said.items():
        id = vocabulary.get(token, vocabulary.get(unknown or ""))  # later ones win, as there
        if id is None or isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(
                f"{file} must hold a number for each token of the tokenizer, got {weight!r} for "
                f"{json.dumps(token)}; it belongs to another tokenizer."
            )
        weights[id] = weight
    return weights
