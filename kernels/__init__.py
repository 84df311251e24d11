"""Vocabulary projection with max pooling, and top-k selection, on ragged batches.

`project_pool` and `select_topk` choose an implementation by device; `reference` is what all of them
must agree with. Names are imported on first use, because most of them need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdr_db.kernels.activation import activate
    from vdr_db.kernels.dispatch import choose_backend, gather_kept, project_pool, select_topk
    from vdr_db.kernels.names import ACTIVATIONS, BACKENDS, Activation, Backend
    from vdr_db.kernels.reference import Pooled, Selection

__all__ = [  # noqa: RUF022  (plain order, as every public module has it)
    "ACTIVATIONS",
    "Activation",
    "BACKENDS",
    "Backend",
    "Pooled",
    "Selection",
    "activate",
    "choose_backend",
    "gather_kept",
    "project_pool",
    "select_topk",
]

_HOMES = {
    "names": ("ACTIVATIONS", "Activation", "BACKENDS", "Backend"),
    "reference": ("Pooled", "Selection"),
    "activation": ("activate",),
    "dispatch": ("choose_backend", "gather_kept", "project_pool", "select_topk"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is not None:
        from importlib import import_module

        from vdr_db.errors import require

        if home != "names":
            require("torch", "torch")
        value = globals()[name] = getattr(import_module(f"vdr_db.kernels.{home}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, imported or not yet."""
    return sorted(__all__)
