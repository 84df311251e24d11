"""The two sides of a search as frameworks ask for them: texts in, ids and weights in lists out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from vdr_db.connectors.collections.encoding import AnyEncoder, Encoder, Encoding, Mode
from vdr_db.errors import ConfigError
from vdr_db.sparse import SparseRows

__all__ = ["TextSides", "checked_mode", "id_weight_lists"]


class TextSides:
    """An encoder in one mode, which several threads may ask.

    Args:
        encoder: Makes vectors of texts; the name or folder of a model is loaded when first needed.
        mode: `"alpha"` asks with bags of tokens, `"beta"` stores bags of tokens; see `Mode`.

    Raises:
        ConfigError: The mode is unknown.
    """

    def __init__(self, encoder: AnyEncoder, *, mode: Mode = "full") -> None:
        self._encoding = Encoding(encoder)
        self.mode = checked_mode(mode)

    @property
    def encoder(self) -> Encoder:
        """What makes the vectors."""
        return self._encoding.need(type(self).__name__)

    def document_rows(self, texts: Sequence[str]) -> SparseRows:
        """Documents as the mode stores them: bags of tokens in beta, else encoded."""
        return self._encoding.documents(texts, "tokens" if self.mode == "beta" else "encoded")

    def query_rows(self, texts: Sequence[str]) -> SparseRows:
        """Queries as the mode asks them: bags of tokens in alpha, else encoded."""
        return self._encoding.queries(texts, self.mode)


def checked_mode(mode: Mode) -> Mode:
    """The mode, if there is such a one.

    Raises:
        ConfigError: There is not.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"`mode` must be 'full', 'alpha' or 'beta', got {mode!r}.")
    return mode


def id_weight_lists(rows: SparseRows) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and weights of each row as lists of Python numbers."""
    for i in range(len(rows)):
        ids, weights = rows.row(i)
        yield ids.tolist(), weights.tolist()
