"""In which precision a body computes, as it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from vdr_db.errors import ConfigError
from vdr_db.towers.interface import Precision
from vdr_db.warning import warn_caller

if TYPE_CHECKING:
    import torch

__all__ = ["checked_precision"]


def checked_precision(
    precision: Precision, dtype: str | torch.dtype | None
) -> tuple[Precision, str | torch.dtype | None]:
    """The precision, and the dtype of torch that belongs to it.

    Args:
        precision: As in `SparseEncoder.from_pretrained`.
        dtype: The same; `"float32"` and `"bfloat16"` are the older way to ask for a precision.

    Raises:
        ConfigError: There is no such precision, or the two contradict each other.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"`precision` must be one of {get_args(Precision)}, got {precision!r}.")
    if dtype is None:
        return precision, "bfloat16" if precision == "bfloat16" else None
    if precision != "float32":
        raise ConfigError(
            f"one of `precision` and `dtype` must be left alone, got {precision!r} and {dtype!r}; "
            "`dtype` is for float16 and float64 on torch."
        )
    older: dict[str, Precision] = {"float32": "float32", "bfloat16": "bfloat16"}
    named = older.get(str(dtype).removeprefix("torch."))
    if named is None:
        return precision, dtype
    warn_caller(f"dtype={dtype!r} is now called precision={named!r}.", FutureWarning)
    return checked_precision(named, None)
