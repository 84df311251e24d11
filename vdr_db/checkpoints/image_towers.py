"""Towers of image encoders in torch, filled with the weights that a plan points to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vdr_db.checkpoints.image_graph import own_rows
from vdr_db.checkpoints.image_plan import OWN_IDS, OWN_ROWS, OWN_SCALES, PROJECTION, ImagePlan
from vdr_db.checkpoints.text import LoadOptions, load_text
from vdr_db.checkpoints.weights import (
    Checkpoint,
    assign,
    checked_device,
    checked_dtype,
    digest,
    refuse_unexpected,
)
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.image import ImageHead, ImageTower, make_body
from vdr_db.towers.text import Tower

__all__ = ["build_tower"]


def build_tower(
    plan: ImagePlan,
    vocabulary: Vocabulary,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> tuple[ImageTower, str]:
    """A tower of images, and the digest of its weights, `""` for float32.

    Args:
        plan: Of a folder.
        vocabulary: Of the columns.
        device: As in `ImageEncoder.from_pretrained`.
        dtype: As in `ImageEncoder.from_pretrained`.

    Raises:
        ConfigError: Weights are missing, damaged or of another model; or this machine has no such
            device, or torch no such dtype.
    """
    kind, place = checked_dtype(dtype), checked_device(device)
    with torch.inference_mode(False):  # inference tensors could neither be trained nor stamped
        body = make_body(plan.body_kind, plan.body_settings)
        tower = ImageTower(body, ImageHead(body.hidden_size, vocabulary.columns))
        _fill(tower, plan, vocabulary)
        # before rounding, so that all dtypes of a model are one model
        known = "" if kind == torch.float32 else digest(dict(tower.named_parameters()))
        tower.to(device=place, dtype=kind).eval()
    return tower, known


def _fill(tower: ImageTower, plan: ImagePlan, vocabulary: Vocabulary) -> None:
    """Weights of the checkpoint, float32 on the CPU; counters and the like as they are stored."""
    checkpoint = Checkpoint(plan.folder)
    parameters = {name for name, _ in tower.named_parameters()}
    names = plan.names or {name: (name,) for name in tower.state_dict()}
    present = set(checkpoint.names)
    buffers = {
        ours: checkpoint.tensor(theirs[0])
        for ours, theirs in names.items()
        if ours not in parameters and theirs[0] in present
    }
    weights = {ours: theirs for ours, theirs in names.items() if ours in parameters}
    if plan.matrix_of is not None:
        weights.pop(PROJECTION)
        buffers[PROJECTION] = _text_matrix(plan.matrix_of)
        own, places = own_rows(plan, vocabulary)
        if own is not None:
            buffers[PROJECTION][torch.from_numpy(places)] = torch.from_numpy(own.read())
    used = assign(tower, checkpoint, weights, others=buffers)
    used |= {names[ours][0] for ours in buffers} | {OWN_ROWS, OWN_IDS, OWN_SCALES}
    refuse_unexpected(checkpoint, used, plan.ignored)


def _text_matrix(folder: Path) -> Tensor:
    """A copy of the vocabulary matrix of a text encoder without scales, `[V, H]` float32."""
    tower = load_text(folder, LoadOptions(device="cpu", runtime="torch")).document_tower
    assert isinstance(tower, Tower)
    return tower.plain_matrix().detach().clone()
