"""Texts to sparse vectors end to end: sentence-transformers, the same with our head, and ours.

The model has random weights and a made-up vocabulary: time does not depend on what they mean, and
nothing needs to be downloaded. Documents are encoded in one call, queries one by one.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from kernel_cases import SEED, Arm

from vdr_db import SparseEncoder as OwnEncoder
from vdr_db.integrations.sentence_transformers import accelerate
from vdr_db.towers.interface import Precision

PEER = "sentence-transformers"
LARGEST_DIFFERENCE = 0.1
"""Of a weight, between the libraries: both round to bfloat16 in every layer, in another order."""


def encode_arms(device: torch.device, *, is_tiny: bool) -> tuple[list[tuple[Arm, str]], list[str]]:
    """Arms that encode the same texts with the name of their shape, and what is wrong with them."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

    V = 200 if is_tiny else 30522
    n_texts, longest = (4, 12) if is_tiny else (1024, 200)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    picker = random.Random(SEED)
    words = [f"w{number}" for number in range(V - 5)]
    texts = [
        " ".join(picker.choices(words, k=picker.randint(longest // 8, longest)))
        for _ in range(n_texts)
    ]
    query = " ".join(picker.choices(words, k=8))
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, words, is_tiny=is_tiny)
        length = 64 if is_tiny else 256
        peer = SparseEncoder(
            modules=[MLMTransformer(folder, max_seq_length=length), SpladePooling("max")],
            device=str(device),
        )
        precision: Precision = "bfloat16" if device.type == "cuda" else "float32"
        ours = OwnEncoder.from_pretrained(
            folder, device=device, precision=precision, max_length=length
        )
    peer.eval().to(dtype)

    def encode(chosen: list[str]) -> object:
        return peer.encode(chosen, batch_size=64, show_progress_bar=False)

    def accelerated(chosen: list[str]) -> object:
        backend = "triton" if device.type == "cuda" else "auto"
        with accelerate(peer, backend=backend, check=False):
            return encode(chosen)

    def captured(chosen: list[str]) -> object:
        ours.query_graphs = True
        try:
            return ours.encode_queries(chosen)
        finally:
            ours.query_graphs = False

    name = "tiny" if is_tiny else f"BERT-base, V={V}"
    ways: list[tuple[str, Callable[[list[str]], object], Callable[[list[str]], object]]] = [
        (PEER, encode, encode),
        (f"{PEER} + vdr_db head", accelerated, accelerated),
        ("vdr_db", ours.encode_documents, ours.encode_queries),
        ("vdr_db, captured", ours.encode_documents, captured),
    ]
    documents = f"encode {n_texts} texts, {name}"
    queries = f"encode 1 query, {name}"
    arms = []
    for by, of_documents, of_queries in ways:
        if "captured" not in by:
            arms.append(_arm(by, of_documents, texts, documents))
        arms.append(_arm(by, of_queries, [query], queries))
    expected = dense(encode(texts[:32]))
    wrong = [
        f"{documents}: {by} differs from {PEER} by {gap:.2g}"
        for by, found in (
            ("vdr_db", ours.encode_documents(texts[:32])),
            ("vdr_db, captured", captured(texts[:32])),
            ("vdr_db head", accelerated(texts[:32])),
        )
        if (gap := float(np.abs(dense(found) - expected).max())) > LARGEST_DIFFERENCE
    ]
    return arms, wrong


def _arm(
    by: str, encode: Callable[[list[str]], object], texts: list[str], shape: str
) -> tuple[Arm, str]:
    return Arm("encode", by, lambda: encode(texts), use_graph=False), shape


def dense(vectors: object) -> np.ndarray:
    """Vectors of either library as an array `[texts, V]`."""
    if isinstance(vectors, torch.Tensor):
        return vectors.to_dense().float().cpu().numpy()
    return vectors.to_scipy().toarray()  # type: ignore[attr-defined, no-any-return]


def write_model(folder: str, words: list[str], *, is_tiny: bool) -> None:
    """A masked language model of BERT-base's size, or a tiny one, with a tokenizer of words."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    sizes = (
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64}
        if is_tiny
        else {}
    )  # fmt: skip
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    Path(folder, "vocab.txt").write_text("\n".join(specials + words))
    BertTokenizerFast(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
    torch.manual_seed(SEED)
    config = BertConfig(vocab_size=len(specials) + len(words), **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
