"""One call that takes the `[B, L, V]` logits out of a sentence-transformers `SparseEncoder`.

```python
from sentence_transformers import SparseEncoder
from vdr_db.integrations.sentence_transformers import accelerate

model = SparseEncoder("naver/splade-v3")
accelerate(model)          # encode and train as before
```

A SPLADE `SparseEncoder` is a masked language model followed by `SpladePooling`. The model writes
logits `[B, L, V]`, the pooling reduces them to `[B, V]`. `accelerate` lets the model stop one step
earlier, at the hidden states `[B, L, H]` that its last linear layer would multiply, and hands that
layer's weights to `vdr_db.kernels.project_pool` in the pooling. Modules, parameters, their names
and the saved files stay what they were; only two `forward` methods are replaced, on the instances.

Until `restore`, calling the inner language model directly gives hidden states, not logits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from vdr_db.errors import ConfigError, require
from vdr_db.kernels import Activation, Backend, activate, project_pool

__all__ = ["TOLERANCE", "Acceleration", "accelerate"]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}
"""Largest difference of a weight, by dtype of the model: relative above 1, absolute below."""

_ACTIVATIONS: dict[str, Activation] = {"relu": "log1p_relu", "log1p_relu": "double_log1p_relu"}
_PROBE = ["one probe of the fused head", "short", "words that stand in the middle of a sentence"]


class _PassThrough:
    """Replaces the forward of the vocabulary projection: the product is left to the pooling."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden


class _FusedPooling:
    """Replaces the forward of `SpladePooling`; receives hidden states instead of logits.

    An object and not a closure, so that copies and pickles of the model keep projection and pooling
    together.
    """

    def __init__(self, pooling: Any, projection: nn.Linear, backend: Backend) -> None:
        self.pooling, self.projection, self.backend = pooling, projection, backend

    def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = features["token_embeddings"]
        dtype = torch.float32 if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        if "cu_seq_lens_q" in features:  # sentence-transformers packed the batch already
            packed, cu_seqlens = hidden.squeeze(0), features["cu_seq_lens_q"]
        else:
            kept = features["attention_mask"].bool()
            packed = hidden[kept]
            cu_seqlens = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        # No text is longer than the padded batch, nor than all tokens of a packed one.
        longest = hidden.shape[1]
        weight, bias = self.projection.weight, self.projection.bias
        packed = packed.to(weight.dtype)
        logits = project_pool(
            packed, cu_seqlens, weight, bias, max_length=longest, backend=self.backend
        ).logits
        activation = _ACTIVATIONS[self.pooling.activation_function]
        features["sentence_embedding"] = activate(logits, activation).to(dtype)
        if self.pooling.embedding_dimension is None:
            self.pooling.embedding_dimension = logits.shape[1]
        return features


class Acceleration(AbstractContextManager["Acceleration", None]):
    """The replaced parts of one model; `restore` puts the original ones back.

    As a context manager it restores at the end of the block.
    """

    def __init__(self, parts: list[tuple[nn.Linear, nn.Module]], backend: Backend) -> None:
        self._parts = parts
        for projection, pooling in parts:
            projection.__dict__["forward"] = _PassThrough()
            pooling.__dict__["forward"] = _FusedPooling(pooling, projection, backend)

    def restore(self) -> None:
        """Puts the original forward methods back; calling it twice does no harm."""
        for part in (module for pair in self._parts for module in pair):
            part.__dict__.pop("forward", None)

    def __exit__(self, *_: object) -> None:
        """Restores the model."""
        self.restore()


def accelerate(model: Any, *, backend: Backend = "auto", check: bool = True) -> Acceleration:
    """Replaces the vocabulary projection and SPLADE pooling of a model by the fused head.

    Works for encoding and training, on every device the kernels run on. Vectors agree with the
    original ones within `TOLERANCE`; a `chunk_size` of the pooling has no further effect.

    Args:
        model: A sentence-transformers `SparseEncoder`, also one whose `Router` holds such modules.
        backend: Which kernels to use, as in `vdr_db.kernels.project_pool`.
        check: Encode a few words before and after, and undo everything if they disagree.

    Returns:
        A handle with `restore()`.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ConfigError: The model has no SPLADE pooling by maximum behind a masked language model, is
            accelerated already, or the vectors disagree.
    """
    if not isinstance(model, require("sentence_transformers", "bench").SparseEncoder):
        raise ConfigError(
            "`model` must be a sentence-transformers SparseEncoder, got "
            f"{type(model).__name__}; vdr_db's own encoder needs no acceleration."
        )
    parts = _find_parts(model)
    if any("forward" in pooling.__dict__ for _, pooling in parts):
        raise ConfigError(
            "this model is accelerated already; use the handle of the first call, and its "
            "`restore()` before changing the backend."
        )
    before = _probe(model) if check else None
    acceleration = Acceleration(parts, backend)
    if before is None:
        return acceleration
    try:
        after = _probe(model)
        gap = _largest_gap(before, after)
    except BaseException:
        acceleration.restore()
        raise
    allowed = TOLERANCE[next(model.parameters()).dtype]
    if not gap <= allowed:
        acceleration.restore()
        raise ConfigError(
            f"vectors must agree within {allowed:g}, got a gap of {gap:g}; this model does more "
            "between its last linear layer and the pooling than the fused head knows. "
            "The model is unchanged."
        )
    return acceleration


def _find_parts(model: nn.Module) -> list[tuple[nn.Linear, nn.Module]]:
    modules = require("sentence_transformers.sparse_encoder.modules", "bench")
    parts = []
    for container in model.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        for transformer, pooling in pairwise(container.children()):
            if isinstance(pooling, modules.SpladePooling):
                parts.append((_projection(transformer), _checked(pooling)))
    if not parts:
        raise ConfigError(
            "`model` must hold a SpladePooling behind a masked language model, got the modules "
            f"{[type(child).__name__ for child in model.children()]}."
        )
    return parts


def _projection(transformer: nn.Module) -> nn.Linear:
    language_model: Any = getattr(transformer, "model", None)
    output = getattr(language_model, "get_output_embeddings", lambda: None)()
    if not isinstance(output, nn.Linear):
        raise ConfigError(
            "the module before SpladePooling must end in a linear vocabulary projection, got "
            f"{type(language_model).__name__} with {type(output).__name__}; "
            "ONNX and OpenVINO models cannot be accelerated."
        )
    return output


def _checked(pooling: Any) -> nn.Module:
    if pooling.pooling_strategy != "max":
        raise ConfigError(
            f"SpladePooling must pool by 'max', got {pooling.pooling_strategy!r}; a sum of "
            "activations does not commute with the projection."
        )
    return cast(nn.Module, pooling)


def _probe(model: Any) -> Tensor:
    was_training = model.training
    vectors = model.encode(_PROBE, convert_to_sparse_tensor=False, show_progress_bar=False)
    model.train(was_training)
    return cast(Tensor, vectors).float()


def _largest_gap(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    return float(((before - after).abs() / before.abs().clamp(min=1)).max())
