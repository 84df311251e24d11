"""Which weights of a folder are those of a tower of texts; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vdr_db.checkpoints.plan import Plan, TowerPlan, tower_names
from vdr_db.checkpoints.weights import Checkpoint, check_layers
from vdr_db.towers.families import WeightNames

__all__ = ["DECODER", "WORDS", "weight_names"]

WORDS, DECODER = "body.embeddings.word.weight", "head.decoder.weight"


def weight_names(plan: Plan, where: TowerPlan, checkpoint: Checkpoint) -> tuple[WeightNames, str]:
    """Weight of a tower -> its names in the checkpoint, and the prefix of its body there.

    The decoder is left out where it is the word embeddings.

    Args:
        plan: Of the folder.
        where: Of the tower.
        checkpoint: Of the folder.
    """
    assert where.family is not None  # bodies of transformers name their weights themselves
    layers = where.family.body_config(where.config).layers
    check_layers(layers, checkpoint)
    prefix = where.body_prefix
    if plan.fresh and not any(name.startswith(prefix) for name in checkpoint.names):
        prefix = ""  # the body alone, without the prefix of a masked language model
    names = tower_names(where.family, layers, plan.head, prefix, where.head_prefix)
    if plan.head == "mlm":
        word, decoder = names[WORDS], names[DECODER]
        if _is_tied(checkpoint, word[0], decoder[0], where.config):
            names[WORDS] = (*word, *decoder)
            del names[DECODER]
    return names, prefix


def _is_tied(checkpoint: Checkpoint, word: str, decoder: str, config: Mapping[str, Any]) -> bool:
    """Whether the decoder is the word embeddings: what the weights say counts, then the config."""
    present = set(checkpoint.names)
    if not {word, decoder} <= present:
        return bool(config.get("tie_word_embeddings", True))
    if checkpoint.shape(word) != checkpoint.shape(decoder):
        return False
    return np.array_equal(checkpoint.array(word), checkpoint.array(decoder))
