"""Shapes, inputs, arms and checks of the kernel benchmark."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import rivals
import torch
from torch import Tensor

from vdr_db.kernels import reference
from vdr_db.kernels.cuda import pooling, scan
from vdr_db.kernels.cuda.configs import PERSISTENT, PoolTile
from vdr_db.kernels.cuda.topk import select_topk

SEED = 20251121


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        B: Texts.
        L: Longest text, in tokens.
        H: Hidden size.
        V: Dimensions.
        mix: `"full"` (all texts L long) or `"realistic"` (log-normal lengths, about 0.6 L in mean).
        k: Dimensions kept per text.
    """

    B: int
    L: int
    H: int
    V: int
    mix: str = "full"
    k: int = 768

    def __str__(self) -> str:
        return f"B={self.B} L={self.L} H={self.H} V={self.V} {self.mix}"


FULL_CASES = (
    Case(64, 256, 768, 30522),
    Case(320, 512, 768, 30522),
    Case(8, 32, 768, 30522, k=256),
    Case(64, 256, 768, 30522, "realistic"),
    Case(320, 512, 768, 30522, "realistic"),
    Case(8, 32, 768, 30522, "realistic", k=256),
    Case(64, 256, 384, 30522),
    Case(64, 256, 1024, 30522),
    Case(64, 256, 768, 250002),
    Case(8, 32, 768, 250002, k=256),
)
"""In the order in which they are run: the headline shapes come first."""

DRY_CASES = (Case(3, 20, 32, 90, "realistic", 12), Case(2, 5, 24, 70, "full", 7))


class Inputs:
    """Random inputs of a case, padded and packed, and the gradients that flow back."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(SEED)
        lengths = case_lengths(case)
        self.case, self.device, self.dtype = case, device, dtype
        self.bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        self.T = self.bounds[-1]
        self.cu_seqlens = torch.tensor(self.bounds, dtype=torch.int32, device=device)
        self.hidden = normal((self.T, case.H), generator, device, dtype)
        self.weight = normal((case.V, case.H), generator, device, dtype) / math.sqrt(case.H)
        self.mask = (
            torch.arange(max(lengths), device=device)
            < torch.tensor(lengths, device=device)[:, None]
        )
        self.grad = normal((case.B, case.V), generator, device, torch.float32)
        self.logits, self.argmax = pooling.forward(
            self.hidden, self.cu_seqlens, self.weight, None, True, max_length=case.L
        )
        kept = select_topk(self.logits, case.k, activation="elu1p")
        self.indptr, self.columns = kept.indptr, kept.columns
        texts = torch.repeat_interleave(torch.arange(case.B, device=device), kept.indptr.diff())
        self.argmax_at_kept = self.argmax[texts, kept.columns.long()]
        self.grad_at_kept = self.grad[texts, kept.columns.long()]

    @functools.cached_property
    def padded(self) -> Tensor:
        """Hidden states `[B, L, H]`, zeros at padding."""
        padded = self.hidden.new_zeros((*self.mask.shape, self.case.H))
        padded[self.mask] = self.hidden
        return padded


def case_lengths(case: Case) -> list[int]:
    """Tokens of each text."""
    if case.mix == "full":
        return [case.L] * case.B
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.exp(torch.randn(case.B, generator=generator) * 0.6 + math.log(0.55 * case.L))
    return lengths.round().long().clamp(1, case.L).tolist()


def normal(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Normal numbers on a device."""
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


@dataclass(frozen=True)
class Arm:
    """Something to time.

    Attributes:
        op: Operation.
        backend: Implementation.
        call: What to time.
        flop: Arithmetic over real tokens, 0 where a rate says nothing.
        use_graph: Whether it may be captured.
        needs_bytes: Rough bound on device memory, to pass over what does not fit.
    """

    op: str
    backend: str
    call: Callable[[], object]
    flop: float = 0.0
    use_graph: bool = True
    needs_bytes: float = 0.0


def arms(given: Inputs, compiled: Callable[..., Tensor] | None) -> Iterator[Arm]:
    """All arms of a case: the product of the same shape, which rates compare with, then ours."""
    case = given.case
    hidden, cu_seqlens, weight = given.hidden, given.cu_seqlens, given.weight
    flop = 2.0 * given.T * case.V * case.H
    element = hidden.element_size()

    def forward(need_argmax: bool) -> tuple[Tensor, Tensor | None]:
        return pooling.forward(hidden, cu_seqlens, weight, None, need_argmax, max_length=case.L)

    def dense_backward() -> object:
        return pooling.backward(given.grad, given.argmax, hidden, cu_seqlens, weight)

    def kept_backward() -> object:
        return pooling.backward_sparse(
            given.grad_at_kept, given.indptr, given.columns, given.argmax_at_kept,
            hidden, cu_seqlens, weight,
        )  # fmt: skip

    def select() -> object:
        return select_topk(given.logits, case.k, activation="elu1p", trim=False)

    logit_bytes = element * given.T * case.V
    product = functools.cache(lambda: hidden.new_empty((given.T, case.V)))
    yield Arm(
        "same-shape product", "torch.mm",
        lambda: torch.mm(hidden, weight.T, out=product()), flop, True, logit_bytes,
    )  # fmt: skip
    yield Arm("forward", "vdr_db", lambda: forward(False), flop)
    yield Arm("forward with argmax", "vdr_db", lambda: forward(True), flop)
    if pooling.takes_persistent(hidden, weight):
        for need_argmax in (False, True):
            yield Arm(
                "forward with argmax" if need_argmax else "forward", "vdr_db, persistent",
                lambda need=need_argmax: pooling.forward(
                    hidden, cu_seqlens, weight, None, need, max_length=case.L, tile=PERSISTENT
                ), flop,
            )  # fmt: skip
    yield Arm("backward, all entries", "vdr_db", dense_backward)
    yield Arm(
        "backward, all entries", "atomics",
        lambda: rivals.atomics_backward(given.grad, given.argmax, hidden, cu_seqlens, weight),
    )  # fmt: skip
    yield Arm("backward, kept entries", "vdr_db", kept_backward)
    yield Arm("forward+backward", "vdr_db", lambda: (forward(True), dense_backward()), flop)
    yield Arm(
        "forward+backward, kept entries", "vdr_db",
        lambda: (forward(True), select(), kept_backward()), flop,
    )  # fmt: skip
    codes = functools.cache(lambda: scan.encoded(weight))
    for activation in ("elu1p", "log1p_relu"):
        yield Arm(
            "forward", f"vdr_db, scan in integers, {activation}",
            lambda activation=activation: scan.scan(
                codes(), hidden, cu_seqlens, weight, k=case.k, activation=activation
            ), flop,
        )  # fmt: skip
    yield Arm("top-k", "vdr_db", select)
    yield Arm("top-k", "torch.topk", lambda: torch.topk(given.logits, case.k, sorted=False))

    rows = max(8192, case.L)
    buffer = functools.cache(lambda: hidden.new_empty((min(rows, given.T), case.V)))
    output = functools.cache(lambda: hidden.new_empty((case.B, case.V)))
    yield Arm(
        "forward", "chunked cuBLAS + segment max",
        lambda: rivals.chunked(hidden, given.bounds, weight, buffer(), output()),
        flop, True, element * rows * case.V,
    )  # fmt: skip
    block = 128 if given.device.type == "cuda" else 16
    on_rows = functools.partial(rivals.tokens_on_rows, hidden, cu_seqlens, weight, block)
    yield Arm("forward", "tokens on M, online max", on_rows, flop)
    yield Arm(
        "forward+backward", "tokens on M, online max, atomics",
        lambda: rivals.atomics_backward(
            given.grad, on_rows()[1], hidden, cu_seqlens, weight
        ), flop,
    )  # fmt: skip

    head = rivals.sparton_head(weight) if given.device.type == "cuda" else None
    if head is not None:
        mask = given.mask.to(given.dtype)

        def published() -> Tensor:
            with torch.no_grad():
                found: Tensor = head(given.padded, mask)
            return found

        def published_trained() -> object:
            padded = given.padded.detach().requires_grad_()
            output = head(padded, mask)
            return torch.autograd.grad(output, [padded, head.weight], given.grad.to(output.dtype))

        yield Arm("forward with argmax", rivals.sparton_name(), published, flop, False)
        yield Arm("forward+backward", rivals.sparton_name(), published_trained, flop, False)

    padded_bytes = element * case.B * case.L * case.V
    for name, pool in (("eager", rivals.eager), ("torch.compile(max-autotune)", compiled)):
        if pool is None:
            continue

        def plain(pool: Callable[..., Tensor] = pool) -> Tensor:
            with torch.no_grad():
                return pool(given.padded, given.mask, weight)

        def trained(pool: Callable[..., Tensor] = pool) -> object:
            leaves = [given.padded.detach().requires_grad_(), weight.detach().requires_grad_()]
            output = pool(leaves[0], given.mask, leaves[1])
            return torch.autograd.grad(output, leaves, given.grad.to(output.dtype))

        yield Arm("forward", name, plain, flop, False, 4 * padded_bytes)
        yield Arm("forward+backward", name, trained, flop, False, 7 * padded_bytes)


def layouts_agree(given: Inputs) -> bool:
    """Whether both tilings give the same bits, which no rule of the device promises."""
    for tile in other_layouts(given):
        other, _ = pooling.forward(given.hidden, given.cu_seqlens, given.weight, tile=tile)
        if not torch.equal(other, given.logits):
            return False
    return True


def check(given: Inputs) -> list[str]:
    """Compares kernels with float64 on parts of a case; returns what is wrong."""
    case, wrong = given.case, []
    texts = sorted({0, case.B // 2, case.B - 1})
    columns = torch.arange(0, case.V, max(1, case.V // 997), device=given.device)
    weight = given.weight[columns].double()
    rounding = 1e-4 if given.dtype != torch.float32 else 1e-5
    for text in texts:
        tokens = given.hidden[given.bounds[text] : given.bounds[text + 1]].double()
        products = tokens @ weight.T
        best = products.amax(0)
        got = given.logits[text, columns].double()
        if not torch.allclose(got, best, rtol=rounding, atol=rounding):
            wrong.append(f"{case}: logits off by {float((got - best).abs().max()):.2e}")
        reached = products.gather(0, given.argmax[text, columns].long()[None])[0]
        if not torch.allclose(reached, best, rtol=rounding, atol=rounding):
            wrong.append(f"{case}: a position does not reach the maximum")
    again, _ = pooling.forward(given.hidden, given.cu_seqlens, given.weight)
    if not torch.equal(again, given.logits):
        wrong.append(f"{case}: logits differ between runs, or with and without positions")
    for tile in other_layouts(given):
        other, _ = pooling.forward(given.hidden, given.cu_seqlens, given.weight, tile=tile)
        if not torch.allclose(other, given.logits, rtol=1e-5, atol=1e-5):
            wrong.append(f"{case}: logits differ between tilings ({tile.layout})")
    wrong += check_gradients(given, columns)
    head = rivals.sparton_head(given.weight) if given.device.type == "cuda" else None
    if head is not None:
        with torch.no_grad():
            output = head(given.padded, given.mask.to(given.dtype)).float()
        expected = given.logits.relu().log1p()
        if not torch.allclose(output, expected, rtol=2e-2, atol=2e-2):
            wrong.append(f"{case}: Sparton is off by {float((output - expected).abs().max()):.2e}")
    scanned = scan.scan(
        scan.encoded(given.weight), given.hidden, given.cu_seqlens, given.weight, k=case.k,
        activation="elu1p",
    )  # fmt: skip
    least = given.logits.topk(case.k).values[:, -1:]
    clearly = given.logits > least + 1e-4 * (1 + least.abs())  # the last bits are others
    if not torch.allclose(scanned[clearly], given.logits[clearly], rtol=1e-4, atol=1e-4):
        wrong.append(f"{case}: the scan leaves out what is kept, or scores it otherwise")
    expected = reference.select_topk(given.logits[:2], case.k, activation="elu1p")
    found = select_topk(given.logits[:2], case.k, activation="elu1p")
    if not torch.equal(expected.columns, found.columns):
        wrong.append(f"{case}: the selection differs from its definition")
    return wrong


def other_layouts(given: Inputs) -> list[PoolTile]:
    """A tile of each layout that runs here."""
    block_t = 128 if given.device.type == "cuda" else 64
    takes_persistent = pooling.takes_persistent(given.hidden, given.weight)
    return [
        *([PERSISTENT] if takes_persistent else []),
        PoolTile("aligned", 256, block_t, 64, 8, 8, 3, True),
        PoolTile("packed", 256, 64, 64, 8, 8, 4, True),
    ]


def check_gradients(given: Inputs, columns: Tensor) -> list[str]:
    """Compares gradients with float64 sums over the positions found; returns what is wrong."""
    case, wrong = given.case, []
    starts = given.cu_seqlens[:-1].long()
    part = columns[:: max(1, len(columns) // 16)]
    arguments = (given.hidden, given.cu_seqlens, given.weight)
    token_part = sorted({0, given.T // 2, given.T - 1})
    dense = torch.zeros_like(given.grad)
    texts = torch.repeat_interleave(torch.arange(case.B, device=given.device), given.indptr.diff())
    dense[texts, given.columns.long()] = given.grad_at_kept
    kept = (given.grad_at_kept, given.indptr, given.columns, given.argmax_at_kept)
    found = {
        "all entries, gathered": (
            given.grad, pooling.backward(given.grad, given.argmax, *arguments, method="gather")
        ),
        "all entries, one-hot": (
            given.grad, pooling.backward(given.grad, given.argmax, *arguments, method="onehot")
        ),
        "all entries, atomics": (
            given.grad, (*rivals.atomics_backward(given.grad, given.argmax, *arguments), None)
        ),
        "kept entries": (dense, pooling.backward_sparse(*kept, *arguments)),
    }  # fmt: skip
    unit = torch.finfo(given.dtype).eps
    tokens = starts[:, None] + given.argmax.long()
    for name, (grad, (grad_hidden, grad_weight, _)) in found.items():
        rows = given.hidden[tokens[:, part]].double() * grad[:, part, None]
        error = (grad_weight[part].double() - rows.sum(0)).abs()
        if not (error <= unit * rows.abs().sum(0) + 1e-5).all():
            wrong.append(f"{case}: gradient of weight, {name}, off by {float(error.max()):.2e}")
        for token in token_part:
            b, v = (tokens == token).nonzero(as_tuple=True)
            rows = given.weight[v].double() * grad[b, v, None]
            error = (grad_hidden[token].double() - rows.sum(0)).abs()
            if not (error <= unit * rows.abs().sum(0) + 1e-5).all():
                wrong.append(f"{case}: gradient of hidden, {name}, off by {float(error.max()):.2e}")
    repeat = pooling.backward(given.grad, given.argmax, *arguments, method="gather")
    first = found["all entries, gathered"][1]
    if not (torch.equal(repeat[0], first[0]) and torch.equal(repeat[1], first[1])):
        wrong.append(f"{case}: gradients differ between runs")
    return wrong
