"""Any encoder of this library as a model of `mteb`, which evaluates it on its tasks.

```python
import mteb
from vdr_db import SparseEncoder
from vdr_db.integrations.mteb import MtebModel

model = MtebModel(SparseEncoder.from_pretrained("naver/splade-v3"))
results = mteb.evaluate(model, mteb.get_tasks(["NFCorpus"]))
```

Retrieval gets sparse tensors, so a corpus never becomes `[N, V]`; all other tasks get dense ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from vdr_db.errors import ConfigError, require
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    import torch

    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["MtebModel"]


class MtebModel:
    """An encoder behind the protocol `mteb.EncoderProtocol`.

    Attributes:
        encoder: The encoder.
        mteb_model_meta: What mteb writes into its results about the model.
    """

    def __init__(
        self,
        encoder: SparseEncoder | CrossModalEncoder | str,
        revision: str | None = None,
        *,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Takes an encoder, or loads one.

        Args:
            encoder: An encoder; or the folder or id of one for texts.
            revision: On the hub, for an id.
            device: Where to compute, for an id.
            options: More arguments of `SparseEncoder.from_pretrained`, for an id.

        Raises:
            MissingExtraError: `mteb` is not installed.
            ConfigError: There is no such model.
        """
        meta = require("mteb.models.model_meta", "mteb")
        if isinstance(encoder, str):
            from vdr_db.encoders.text import SparseEncoder

            encoder = SparseEncoder.from_pretrained(
                encoder, revision=revision, device=device, **options
            )
        self.encoder = encoder
        name = encoder.model.rstrip("/")
        owner, _, own = name.rpartition("/")
        known = {
            "name": f"{owner.rpartition('/')[2] or 'vdr-db'}/{own or 'encoder'}",
            "revision": encoder.revision or encoder.stamp().weights[:40],
            "model_type": ["sparse"],
            "similarity_fn_name": "dot",
            "modalities": ["text", "image"] if self._takes_images else ["text"],
            "embed_dim": self._width,
        }
        self.mteb_model_meta = meta.ModelMeta.create_empty(overwrites=known)

    @property
    def _takes_images(self) -> bool:
        return hasattr(self.encoder, "encode_images")

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """Vectors of the texts, or images, of a data loader of mteb.

        Args:
            inputs: Batches with `text`, or with `image` for an encoder of both.
            task_metadata: Of the task: its type says whether vectors may stay sparse.
            hf_split: Not looked at.
            hf_subset: Not looked at.
            prompt_type: Whether these are queries; all else is encoded as documents.
            options: Not looked at, such as the size of a batch.

        Returns:
            `[N, V]` float32: a sparse tensor for retrieval, else a dense one.

        Raises:
            ConfigError: A batch holds something this encoder does not read.
        """
        import torch

        is_query = str(getattr(prompt_type, "value", prompt_type)) == "query"
        parts = [self._rows(batch, is_query) for batch in inputs]
        rows = SparseRows.concat(parts) if parts else SparseRows.empty(0, self._width)
        kind = task_metadata.type
        keeps = task_metadata.simplified_task_type == "retrieval" and "Reranking" not in kind
        counts = torch.from_numpy(rows.counts)
        indices = torch.stack(
            [
                torch.arange(len(rows)).repeat_interleave(counts),
                torch.from_numpy(rows.indices.astype("int64")),
            ]
        )
        values = torch.from_numpy(rows.values.copy())
        vectors = torch.sparse_coo_tensor(
            indices, values, (len(rows), rows.width), is_coalesced=True, check_invariants=False
        )
        return vectors if keeps else vectors.to_dense()

    def similarity(self, embeddings1: torch.Tensor, embeddings2: torch.Tensor) -> torch.Tensor:
        """Dot products of all pairs, `[N1, N2]` float32."""
        if not embeddings2.is_sparse:
            return (
                embeddings1.to_dense() if embeddings1.is_sparse else embeddings1
            ) @ embeddings2.T
        import torch

        dense = embeddings1.to_dense() if embeddings1.is_sparse else embeddings1
        found: torch.Tensor = torch.sparse.mm(embeddings2, dense.T).T
        return found

    def similarity_pairwise(
        self, embeddings1: torch.Tensor, embeddings2: torch.Tensor
    ) -> torch.Tensor:
        """Dot products of rows that stand at one place, `[N]` float32."""
        one, other = (e.to_dense() if e.is_sparse else e for e in (embeddings1, embeddings2))
        return (one * other).sum(-1)

    @property
    def _width(self) -> int:
        return len(self.encoder.vocabulary)

    def _rows(self, batch: Mapping[str, Any], is_query: bool) -> SparseRows:
        if "text" in batch:
            texts = list(batch["text"])
            encoder = self.encoder
            return encoder.encode_queries(texts) if is_query else encoder.encode_documents(texts)
        if "image" in batch and self._takes_images:
            images = list(batch["image"])
            return cast("CrossModalEncoder", self.encoder).encode_images(images).rows
        raise ConfigError(
            f"a batch of mteb must hold {'text or image' if self._takes_images else 'text'}, got "
            f"{sorted(batch)}; choose tasks of these."
        )
