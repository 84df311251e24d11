"""The formulas once more, as plain NumPy loops in float64; they import nothing of the library.

Written from the papers: Zhou et al. 2024 (VDR) for elu1p and the max over tokens, Formal et al.
2021 (SPLADE) for log(1 + relu). What the library calls its reference has to agree with these.
"""

from __future__ import annotations

import math

import numpy as np


def elu1p(x: float) -> float:
    if math.isnan(x):
        return x
    return x + 1 if x >= 0 else math.exp(x)


def log1p_relu(x: float) -> float:
    if math.isnan(x):
        return x
    return math.log1p(x) if x > 0 else 0.0


def double_log1p_relu(x: float) -> float:
    return math.log1p(log1p_relu(x))


def identity(x: float) -> float:
    return x


ACTIVATIONS = {
    "elu1p": elu1p,
    "log1p_relu": log1p_relu,
    "double_log1p_relu": double_log1p_relu,
    "none": identity,
}


def pool(hidden, cu_seqlens, weight, bias=None):
    """Logits [B, V] and position of the first token that reaches each; -inf and -1 without tokens.

    NaN counts as largest.
    """
    B, V = len(cu_seqlens) - 1, len(weight)
    logits = np.full((B, V), -np.inf)
    argmax = np.full((B, V), -1, dtype=np.int64)
    for b in range(B):
        for v in range(V):
            for position, token in enumerate(range(cu_seqlens[b], cu_seqlens[b + 1])):
                product = float(np.dot(hidden[token].astype(float), weight[v].astype(float)))
                best = logits[b, v]
                wins = product > best or (math.isnan(product) and not math.isnan(best))
                if position == 0 or wins:
                    logits[b, v], argmax[b, v] = product, position
            if bias is not None:
                logits[b, v] += float(bias[v])
    return logits, argmax


def gradients(grad_logits, hidden, cu_seqlens, weight):
    """Gradients of hidden, weight and bias: each maximum passes its own to its first token."""
    _, argmax = pool(hidden, cu_seqlens, weight)
    grad_hidden = np.zeros(hidden.shape)
    grad_weight = np.zeros(weight.shape)
    grad_bias = np.zeros(len(weight))
    for b in range(len(cu_seqlens) - 1):
        for v in range(len(weight)):
            if argmax[b, v] < 0:
                continue
            token = cu_seqlens[b] + argmax[b, v]
            grad_hidden[token] += grad_logits[b, v] * weight[v]
            grad_weight[v] += grad_logits[b, v] * hidden[token]
            grad_bias[v] += grad_logits[b, v]
    return grad_hidden, grad_weight, grad_bias


def select(logits, k, activation, lexical=None):
    """Kept columns and weights of each row: a list of {column: weight}."""
    rows = []
    for b, row in enumerate(logits):
        is_nan = [math.isnan(value) for value in row]
        order = [v for v in range(len(row)) if is_nan[v]]
        order += sorted((v for v in range(len(row)) if not is_nan[v]), key=lambda v: (-row[v], v))
        kept = set(order if k is None else order[:k])
        if lexical is not None:
            kept |= set(lexical[b])
        weights = {
            v: ACTIVATIONS[activation](float(row[v])) for v in sorted(kept) if row[v] != -np.inf
        }
        rows.append({v: w for v, w in weights.items() if w > 0 or math.isnan(w)})
    return rows
