"""A body and its head: from packed token ids to one score for each text and column."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vdr_db.kernels import Backend, Pooled
from vdr_db.towers.packing import Run
from vdr_db.towers.text_body import Body, Padding, Ragged
from vdr_db.towers.text_head import Head

__all__ = ["Tower"]


class Tower(nn.Module):
    """A body and its head.

    Attributes:
        body: From token ids to hidden states.
        head: From hidden states to scores.
    """

    def __init__(self, body: Body, head: Head) -> None:
        """Takes the parts over."""
        super().__init__()
        self.body = body
        self.head = head

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        runs: Sequence[Run],
        *,
        backend: Backend = "auto",
        return_argmax: bool = False,
        layout: Padding | Ragged | None = None,
    ) -> Pooled:
        """Scores of each text and column before activation.

        Args:
            input_ids: `[T]` int64, all texts one after the other.
            position_ids: `[T]` int64.
            cu_seqlens: `[B + 1]` integers, text b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`.
            runs: The same texts in groups of equal length; not looked at where there is a layout.
            backend: Of the kernels.
            return_argmax: Whether to tell which token gave each score.
            layout: How attention goes through the texts; None lets the body decide.

        Returns:
            `logits` `[B, V]` float32, `argmax` `[B, V]` int16 (texts of up to 32,767 tokens),
            int32 or None.
        """
        if layout is None:
            layout = self.body.layout(runs, cu_seqlens, device=input_ids.device)
        longest = max((run.length for run in runs), default=None)
        if isinstance(layout, Ragged):
            longest = layout.longest
        hidden = self.body(input_ids, position_ids, runs, layout)
        pooled: Pooled = self.head(
            hidden,
            cu_seqlens,
            self.body.embeddings.word.weight,
            backend=backend,
            return_argmax=return_argmax,
            max_length=longest,
        )
        return pooled
