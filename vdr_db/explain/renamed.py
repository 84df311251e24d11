"""Names of before: `vdr_db.explain` still has them, and each warns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vdr_db.explain.attribution import Attribution, text_attribution, weights_by_position
from vdr_db.explain.explanation import Explanation, ShownImage
from vdr_db.explain.items import explain_image, explain_text
from vdr_db.explain.records import explain_record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from vdr_db.kernels import Activation
    from vdr_db.sparse import SparseRows
    from vdr_db.text.vocabulary import Vocabulary

__all__ = ["RENAMED"]


def _portrait_of_image(
    vocabulary: Vocabulary,
    row: SparseRows,
    picture: ShownImage,
    *,
    evidence: Attribution | None = None,
    heading: str = "image",
) -> Explanation:
    return Explanation.of_image(vocabulary, row, picture, attribution=evidence, heading=heading)


def _position_weights(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    columns: torch.Tensor,
    activation: Activation,
) -> npt.NDArray[np.float32]:
    chosen = None if bias is None else bias[columns].float().cpu().numpy()
    rows = matrix[columns].float().cpu().numpy()
    return weights_by_position(hidden.float().cpu().numpy(), rows, chosen, activation)


RENAMED: dict[str, tuple[str, object]] = {
    "Evidence": ("Attribution", Attribution),
    "Picture": ("ShownImage", ShownImage),
    "Portrait": ("Explanation", Explanation),
    "image_portrait": ("explain_image", explain_image),
    "portrait_of_image": ("Explanation.of_image", _portrait_of_image),
    "portrait_of_record": ("explain_record", explain_record),
    "portrait_of_text": ("explain_text", explain_text),
    "position_weights": ("weights_by_position", _position_weights),
    "text_evidence": ("text_attribution", text_attribution),
}
"""Old name -> the new one, and what the old one gives."""
