"""What stands behind the transformer of a `vdr_db` model, for sentence-transformers 6 and later.

`vdr_db` copies this file into models whose vectors `SpladePooling` does not make; it needs nothing
of `vdr_db`. Load such a model with `SparseEncoder(name, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sentence_transformers.base.modules import Module
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {
    "elu1p": lambda z: F.elu(z) + 1,
    "log1p_relu": lambda z: z.relu().log1p(),
    "double_log1p_relu": lambda z: z.relu().log1p().log1p(),
    "none": lambda z: z,
}


class VdrPooling(Module):  # type: ignore[misc] # of a library without types
    """Largest score of each token over a text, activated, and only the best of them kept.

    Args:
        size: Token ids there are.
        hidden_size: Width of the hidden states.
        head: `"mlm"` takes logits; `"vdr"` normalises hidden states and multiplies them with the
            word embeddings; `"token_weights"` weighs a text's own tokens.
        activation: Turns scores into weights.
        k: Dimensions kept of a `query` and of a `document`, or None for all.
        norm: Whether vectors have L2 norm 1 before that.
        lexical: Whether a text's own tokens are always kept.
        skipped: Token ids that have no dimension.
        special: Token ids that are no part of a text.
    """

    config_keys: ClassVar[list[str]] = [
        *("size", "hidden_size", "head", "activation", "k", "norm", "lexical"),
        *("skipped", "special"),
    ]
    forward_kwargs: ClassVar[set[str]] = {"task"}

    def __init__(
        self,
        size: int,
        hidden_size: int,
        head: str,
        activation: str,
        k: dict[str, int | None],
        norm: bool,
        lexical: bool,
        skipped: list[int],
        special: list[int],
    ) -> None:
        super().__init__()
        self.size, self.hidden_size, self.head, self.activation = (
            size,
            hidden_size,
            head,
            activation,
        )
        self.k, self.norm, self.lexical = k, norm, lexical
        self.skipped, self.special = skipped, special
        self.scale = nn.LayerNorm(hidden_size) if head == "vdr" else None
        self.linear = nn.Linear(hidden_size, 1) if head == "token_weights" else None

    def on_model_ready(self, model: nn.Module) -> None:
        """Finds the transformer before it, whose word embeddings the `vdr` head multiplies with."""
        for container in model.modules():
            parts = list(container.children())
            if self in parts[1:]:
                self.__dict__["transformer"] = parts[parts.index(self) - 1]

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Adds `sentence_embedding`, `[B, size]`."""
        hidden, seen = features["token_embeddings"].float(), features["attention_mask"].bool()
        ids = features["input_ids"]
        if self.linear is not None:
            scores = self._own_weights(hidden, ids, seen)
        else:
            logits = hidden
            if self.scale is not None:
                words = self.__dict__["transformer"].model.get_input_embeddings().weight
                logits = self.scale(hidden) @ words[: self.size].float().T
            logits = logits[..., : self.size].masked_fill(~seen[..., None], -torch.inf)
            scores = logits.amax(1)
        weights = ACTIVATIONS[self.activation](scores)
        weights[:, self.skipped] = 0.0
        scores = scores.masked_fill(weights <= 0, -torch.inf)
        if self.norm:
            weights = weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-12)
        k = self.k.get(task or "document", self.k["document"])
        if k is not None and k < self.size:
            kept = torch.zeros_like(weights, dtype=torch.bool)
            kept.scatter_(1, scores.topk(k, dim=1).indices, True)
            if self.lexical:
                own = torch.zeros_like(kept)
                own.scatter_(1, torch.where(seen, ids, self.special[0]), True)
                own[:, self.special] = False
                kept |= own
            weights = weights * kept
        features["sentence_embedding"] = weights
        return features

    def _own_weights(self, hidden: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
        assert self.linear is not None
        numbers = self.linear(hidden)[..., 0].relu() * seen
        found: Tensor = numbers.new_zeros(len(ids), self.size)
        return found.scatter_reduce_(1, ids, numbers, "amax")

    def get_embedding_dimension(self) -> int:
        """Dimensions of a vector: one for each token id."""
        return self.size

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **_: Any) -> None:
        """Writes settings and weights."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> VdrPooling:
        """Reads what `save` wrote."""
        named = ("token", "cache_folder", "revision", "local_files_only")
        place = {key: options[key] for key in named if key in options}
        place |= {"model_name_or_path": model_name_or_path, "subfolder": subfolder}
        module = cls(**cls.load_config(**place))
        loaded: VdrPooling = cls.load_torch_weights(model=module, **place)
        return loaded
