"""The plot of a run: loss and quality over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdr_db.errors import require

__all__ = ["plot_run"]

SIZE_INCHES = (7.0, 5.5)
DOTS_PER_INCH = 120


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws loss above and held-out nDCG@10 below, over the steps of a run's log.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "train")
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot's global state.
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    parts = sorted({name for row in rows for name in row} & set(PARTS))
    if losses:
        upper.plot(*zip(*losses, strict=True), color="black", label="loss")
    for name in parts:
        points = [(row["step"], row[name]) for row in rows if name in row]
        upper.plot(*zip(*points, strict=True), linewidth=0.8, label=PARTS[name])
    upper.set_ylabel("loss")
    if losses:
        upper.legend(fontsize=8)
    quality = [(row["step"], row["ndcg@10"]) for row in rows if "ndcg@10" in row]
    if quality:
        lower.plot(*zip(*quality, strict=True), marker="o", color="black")
    else:
        lower.text(0.5, 0.5, "no held-out part", ha="center", transform=lower.transAxes)
    lower.set_ylabel("nDCG@10, held out")
    lower.set_xlabel("step")
    figure.savefig(path)


PARTS = {
    "parametric": "gate(V(q)) . V(d)",
    "document_gated": "V(q) . gate(V(d))",
    "lexical": "BoW(q) . V(d)",
    "document_lexical": "V(q) . BoW(d)",
    "infonce": "V(q) . V(d)",
    "kl": "KL to teachers",
    "kl_listed": "KL to listed scores",
    "margin_mse": "margin-MSE",
}
"""Names of the log -> what they are."""
