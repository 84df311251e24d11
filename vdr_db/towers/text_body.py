"""Transformer bodies of the BERT, DistilBERT and RoBERTa families on packed tokens.

Texts stand one after the other in one `[T]` row of tokens, without padding. All matrix products
run over the T packed tokens at once; attention runs on groups of texts of equal length, which are
plain views of the packed rows. So no work is spent on padding, and what a text gets depends on
nothing but the text, bit for bit on the CPU (see `vdr_db.towers.packing.ROW_MULTIPLE`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.towers.families import BodyConfig
from vdr_db.towers.packing import Run
from vdr_db.towers.torch_tower import check_process

__all__ = [
    "ACTIVATIONS",
    "Body",
    "Linear",
    "Padding",
    "Ragged",
    "attend",
    "copied",
    "packing_is_exact",
    "ragged_attention",
    "rows_are_independent",
    "unfilled",
]


QUERY_MULTIPLE = 16
"""Attention on the CPU takes query rows in multiples of this.

torch gives each thread a work space of its own, one after the other, in size a multiple of the
number of query rows. With whole multiples of 16 all of them start on a cache line. Otherwise the
matrix library takes other paths in the second thread than in the first, and the bits of a text
depend on the thread that its batch gives it.
"""


def _gelu_tanh(x: Tensor) -> Tensor:
    # Written out: torch's own kernel treats the last few elements of a thread's share differently,
    # so its bits depend on the number of tokens.
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _silu(x: Tensor) -> Tensor:
    return x * (0.5 * (1.0 + torch.tanh(0.5 * x)))  # the logistic function through tanh, as above


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": _silu,
    "swish": _silu,
}


def unfilled(*shape: int) -> nn.Parameter:
    """A parameter on the meta device; weights come later.

    torch's own modules would fill it with random numbers, which on the meta device costs seconds:
    it loads the whole compiler.
    """
    return nn.Parameter(torch.empty(shape, device="meta"))


class Linear(nn.Module):
    """x W^T + b, made without weights.

    Attributes:
        weight: `[rows, columns]`.
        bias: `[rows]` or None.
    """

    def __init__(self, rows: int, columns: int, *, bias: bool = True) -> None:
        """Makes the parameters on the meta device."""
        super().__init__()
        self.weight = unfilled(rows, columns)
        self.bias = unfilled(rows) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[T, columns]` to `[T, rows]`."""
        return F.linear(x, self.weight, self.bias)


class _Table(nn.Module):
    """Rows by number."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = unfilled(rows, columns)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def _norm(config: BodyConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, device="meta")


class _Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised."""

    def __init__(self, config: BodyConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word = _Table(config.vocab_size, width)
        self.position = _Table(config.positions, width)
        self.token_type = _Table(config.token_types, width) if config.token_types else None
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.word(input_ids)
        if self.token_type is not None:
            hidden = hidden + self.token_type.weight[0]
        return self.norm(hidden + self.position(position_ids))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a norm after it."""

    def __init__(self, config: BodyConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.heads = config.heads
        self.dropout = config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.activation = ACTIVATIONS[config.activation]
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.attended = Linear(width, width)
        self.attended_norm = _norm(config)
        self.up = Linear(wide, width)
        self.down = Linear(width, wide)
        self.down_norm = _norm(config)

    def forward(
        self, hidden: Tensor, runs: Sequence[Run], padding: Padding | Ragged | None
    ) -> Tensor:
        attended = attend(
            self.query(hidden),
            self.key(hidden),
            self.value(hidden),
            runs,
            self.heads,
            dropout=self.attention_dropout if self.training else 0.0,
            padding=padding,
        )
        attended = F.dropout(self.attended(attended), self.dropout, self.training)
        hidden = self.attended_norm(attended + hidden)
        wide = self.activation(self.up(hidden))
        out = F.dropout(self.down(wide), self.dropout, self.training)
        return self.down_norm(out + hidden)  # type: ignore[no-any-return]


class Body(nn.Module):
    """A transformer body; made without weights, which `load_state_dict(assign=True)` brings.

    Attributes:
        config: Sizes and constants.
    """

    def __init__(self, config: BodyConfig) -> None:
        """Builds the modules on the meta device: no memory is used before weights come.

        Raises:
            ConfigError: The activation is unknown.
        """
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise ConfigError(
                f"the activation must be one of {sorted(ACTIVATIONS)}, got {config.activation!r}; "
                "models with another one are not supported."
            )
        self.config = config
        self.embeddings = _Embeddings(config)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        runs: Sequence[Run],
        layout: Padding | Ragged | None = None,
    ) -> Tensor:
        """Hidden states of the last layer.

        Args:
            input_ids: `[T]` int64, all texts one after the other.
            position_ids: `[T]` int64, from `BodyConfig.first_position` on in each text.
            runs: Texts of equal length in packed order; together they cover `[0, T)`. Not looked
                at where there is a layout.
            layout: How attention goes through the texts, from `layout`; None decides by the runs.

        Returns:
            `[T, H]` in the dtype of the weights.
        """
        if layout is None:
            layout = self.layout(runs, device=input_ids.device)
        hidden = self.embeddings(input_ids, position_ids)
        hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, runs, layout)
        return hidden  # type: ignore[no-any-return]

    def layout(
        self, runs: Sequence[Run], cu_seqlens: Tensor | None = None, *, device: torch.device
    ) -> Padding | Ragged | None:
        """How attention goes through a batch: as it is packed where torch can, else padded.

        Args:
            runs: Texts of equal length in packed order.
            cu_seqlens: `[B + 1]` int32, bounds of the same texts on the device, if they are there.
            device: Where the batch is.

        Returns:
            None for one call of attention for each run, on views of the packed rows.
        """
        # On the CPU many small calls cost less than padding, on a GPU more.
        if device.type == "cpu" or len(runs) <= 1:
            return None
        is_whole = all(run.kept == run.length for run in runs)
        if cu_seqlens is not None and is_whole and self.takes_ragged(device):
            return Ragged(cu_seqlens, max(run.length for run in runs))
        return Padding.of(runs, device)

    def takes_ragged(self, device: torch.device) -> bool:
        """Whether attention can read packed rows on a device as things stand.

        The kernel knows float16 and bfloat16 only, and no dropout.
        """
        config = self.config
        if self.training and config.attention_dropout:
            return False
        dtype = self.embeddings.word.weight.dtype
        return ragged_attention(device, dtype, config.hidden_size // config.heads) is not None


@dataclass(frozen=True)
class Ragged:
    """Bounds of packed texts, for attention that needs no padding.

    Attributes:
        bounds: `[B + 1]` int32, text b has rows `bounds[b]` to `bounds[b + 1]`, perhaps none.
        longest: Bound on the rows of a text.
    """

    bounds: Tensor
    longest: int


@dataclass(frozen=True)
class Padding:
    """How packed rows go into padded ones and back, made once for a batch.

    Attributes:
        slots: `[T]` int64, where each packed row goes in `[B * longest]`.
        seen: `[B, 1, 1, longest]` bool, positions that may be attended to.
    """

    slots: Tensor
    seen: Tensor

    @classmethod
    def of(cls, runs: Sequence[Run], device: torch.device) -> Padding:
        """For texts in runs; lengths are known on the host, so the device is never waited for."""
        counts = torch.tensor([run.count for run in runs])
        lengths = torch.tensor([run.length for run in runs]).repeat_interleave(counts)
        kept = torch.tensor([run.kept for run in runs]).repeat_interleave(counts)
        offsets = torch.arange(int(lengths.max()))
        slots = (offsets < lengths[:, None]).flatten().nonzero()[:, 0]
        seen = (offsets < kept[:, None])[:, None, None]
        return cls(copied(slots, device), copied(seen, device))

    def spread(self, packed: Tensor, heads: int) -> Tensor:
        """`[T, H]` to `[B, heads, longest, H / heads]`, zero where there is no row."""
        rows, longest = self.seen.shape[0], self.seen.shape[3]
        padded = packed.new_zeros(rows * longest, packed.shape[1]).index_copy(0, self.slots, packed)
        return padded.view(rows, longest, heads, -1).transpose(1, 2)

    def collect(self, padded: Tensor) -> Tensor:
        """`[B, heads, longest, H / heads]` back to `[T, H]`."""
        rows, _, longest, _ = padded.shape
        return padded.transpose(1, 2).reshape(rows * longest, -1).index_select(0, self.slots)


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of main memory on a device, without waiting for what the device does.

    Copies of ordinary memory may wait, those of pinned memory do not; torch lends pinned memory
    again only after the copy that used it.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[Run],
    heads: int,
    *,
    dropout: float = 0.0,
    padding: Padding | Ragged | None = None,
) -> Tensor:
    """Softmax attention within each text of packed rows.

    Args:
        query: `[T, H]`.
        key: `[T, H]`.
        value: `[T, H]`.
        runs: Texts of equal length in packed order; together they cover `[0, T)`.
        heads: Attention heads; divides H.
        dropout: Probability to drop an attention weight.
        padding: Take all texts in one call, which suits a GPU: on padded rows, or on packed ones
            where torch has a kernel for it. None takes each run in a call of its own, on views of
            the packed rows.

    Returns:
        `[T, H]`.
    """
    if isinstance(padding, Ragged):
        attention = ragged_attention(query.device, query.dtype, query.shape[1] // heads)
        assert attention is not None  # `Body.takes_ragged` has asked
        q, k, v = (rows.unflatten(1, (heads, -1)) for rows in (query, key, value))
        bounds, longest = padding.bounds, padding.longest
        out: Tensor = attention(q, k, v, bounds, bounds, longest, longest)
        return out.flatten(1)
    if padding is not None:
        q, k, v = (padding.spread(rows, heads) for rows in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=padding.seen, dropout_p=dropout)
        return padding.collect(out)
    parts = []
    for run in runs:
        q, k, v = (
            rows[run.start : run.stop].view(run.count, run.length, heads, -1).transpose(1, 2)
            for rows in (query, key, value)
        )
        if run.kept < run.length:
            k, v = k[:, :, : run.kept], v[:, :, : run.kept]
        if rest := -run.length % QUERY_MULTIPLE:
            q = F.pad(q, (0, 0, 0, rest))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)[:, :, : run.length]
        parts.append(out.transpose(1, 2).reshape(-1, query.shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=64)
def ragged_attention(
    device: torch.device, dtype: torch.dtype, head_size: int
) -> Callable[..., Any] | None:
    """Softmax attention on packed rows, or None where torch has none.

    Args:
        device: Where to compute.
        dtype: Of queries, keys and values.
        head_size: Columns of a head.

    Returns:
        A function of q, k, v `[T, heads, head_size]`, the bounds of queries and of keys `[B + 1]`
        int32, and the most rows of a text on either side.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    # What flash attention asks of a device and of heads, in every version of torch that has it.
    if head_size % 8 or head_size > 256 or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    attention: Callable[..., Any] = varlen_attn
    return attention


def packing_is_exact(config: BodyConfig, dtype: torch.dtype) -> bool:
    """Whether this machine's matrix products give a row the same bits in any batch.

    They do with the libraries torch brings for x86; on others it is put to the test, once for each
    size, dtype and number of threads. Where it fails, texts go through the body one by one.

    Args:
        config: Of the body.
        dtype: Of its weights.
    """
    check_process()
    width, wide = config.hidden_size, config.intermediate_size
    threads = torch.get_num_threads()
    return all(rows_are_independent(columns, dtype, threads) for columns in {width, wide})


@lru_cache(maxsize=64)
def rows_are_independent(columns: int, dtype: torch.dtype, _threads: int) -> bool:
    """Whether rows of a product over `columns` have the same bits in any batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, columns, generator=generator).to(dtype)
    weight = torch.randn(256, columns, generator=generator).to(dtype)
    with torch.inference_mode():
        whole = F.linear(x, weight)
        return all(
            torch.equal(F.linear(x[start:stop].clone(), weight), whole[start:stop])
            for start, stop in ((0, 16), (16, 48), (48, 96), (96, 256), (256, 800), (1008, 1024))
        )
