"""How well a collection ranks: metrics, test collections, sweeps over k.

Names are imported on first use: metrics need NumPy alone, the rest an encoder and a store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdr_db.evaluation.metrics import (
        flops,
        mean,
        mean_nonzeros,
        ndcg,
        paired_interval,
        precision,
        recall,
        reciprocal_rank,
    )
    from vdr_db.evaluation.quality import (
        MODES,
        Quality,
        TestCollection,
        evaluate_bm25,
        evaluate_model,
        evaluate_modes,
    )
    from vdr_db.evaluation.sweep import DEFAULT_KS, SweepPoint, sweep_k

__all__ = [
    "DEFAULT_KS",
    "MODES",
    "Quality",
    "SweepPoint",
    "TestCollection",
    "evaluate_bm25",
    "evaluate_model",
    "evaluate_modes",
    "flops",
    "mean",
    "mean_nonzeros",
    "ndcg",
    "paired_interval",
    "precision",
    "recall",
    "reciprocal_rank",
    "sweep_k",
]

_METRICS = (
    *("flops", "mean", "mean_nonzeros", "ndcg", "paired_interval"),
    *("precision", "recall", "reciprocal_rank"),
)
_HOME = dict.fromkeys(__all__, "quality") | dict.fromkeys(_METRICS, "metrics")
_HOME |= dict.fromkeys(("DEFAULT_KS", "SweepPoint", "sweep_k"), "sweep")


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used (PEP 562)."""
    if name in _HOME:
        from importlib import import_module

        home = import_module(f"{__name__}.{_HOME[name]}")
        return globals().setdefault(name, getattr(home, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, imported or not yet."""
    return sorted(__all__)
