"""The errors this library raises on purpose.

```
VdrError
├── ShapeError(ValueError)          sizes or dtypes of arrays or tensors disagree
├── ConfigError(ValueError)         an option, or a saved file, is impossible
├── InputError(ValueError)          the data handed in cannot be used
├── MissingExtraError(ImportError)  an optional package is not installed
└── StoreError                      a store did not do what it was asked
    ├── StoreUnavailable            it cannot be reached or written now; a retry may help
    ├── StoreMismatch               it holds something else than what was opened
    └── RejectedRows                it refused some rows; the others are written
```

Every message says what was expected, what came, and what to do. A caller who wants them all writes
`except VdrError`. One mistake gets Python's own error: a single `str` where a sequence of texts is
expected is a `TypeError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from vdr_db.failure import Failure

__all__ = [
    "ConfigError",
    "InputError",
    "MissingExtraError",
    "RejectedRows",
    "ShapeError",
    "StoreError",
    "StoreMismatch",
    "StoreUnavailable",
    "VdrError",
    "require",
]


class VdrError(Exception):
    """Any error this library raises on purpose."""


class ShapeError(VdrError, ValueError):
    """Sizes or dtypes of arrays or tensors disagree."""


class ConfigError(VdrError, ValueError):
    """An option, or a saved file, is impossible."""


class InputError(VdrError, ValueError):
    """The data handed in cannot be used."""


class MissingExtraError(VdrError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class StoreError(VdrError):
    """A store did not do what it was asked.

    Attributes:
        failure: What it means, where the connector could tell.
    """

    def __init__(self, *message: str, failure: Failure | None = None) -> None:
        super().__init__(*message)
        self.failure = failure


class StoreUnavailable(StoreError):
    """A store cannot be reached or written now; trying again later may help."""


class StoreMismatch(StoreError):
    """A store holds something else than what was opened: another model, another kind of data."""


class RejectedRows(StoreError):
    """A store refused some rows. All other rows of the call are written.

    Attributes:
        ids: The caller's ids of the refused rows.
        reasons: One sentence for each refused row, in the order of `ids`.
    """

    def __init__(self, ids: Sequence[int | str], reasons: Sequence[str]) -> None:
        self.ids = list(ids)
        self.reasons = list(reasons)
        first = zip(self.ids[:3], self.reasons[:3], strict=True)
        shown = "; ".join(f"{id!r}: {reason}" for id, reason in first)
        more = f"; and {len(self.ids) - 3} more" if len(self.ids) > 3 else ""
        super().__init__(
            f"{len(self.ids)} rows were refused ({shown}{more}); "
            "all other rows are written; mend these and add them again."
        )

    def __reduce__(self) -> tuple[type[RejectedRows], tuple[list[int | str], list[str]]]:
        """Keep ids and reasons when the error crosses a process border."""
        return RejectedRows, (self.ids, self.reasons)


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: Name to import, for example `"qdrant_edge"`.
        extra: The extra of this library that installs it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] != error.name.split(".")[0]:
            raise  # installed, but one of its own needs is missing: that message is the better one
        raise MissingExtraError(
            f"`{module}` is needed here and is not installed; run: pip install 'vdr-db[{extra}]'"
        ) from error
