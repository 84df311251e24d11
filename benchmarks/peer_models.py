"""The models of `bench_peers.py`: folders as the hub has them, which every library opens.

Nothing is downloaded but the tiny SPLADE. `minilm` is the trained body and head of the shipped
`vdr-mini` with the GELU that heads of masked language models have, and less what they cannot say
(a position's own token, own weights); it keeps nearly as many columns. `bert-base-random` has
weights from a seed; its bias is lowered until documents keep 256 columns, as trained models do.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from vdr_db import SparseEncoder
from vdr_db.checkpoints.assets import fetch

TINY, MINILM, BASE = "tiny-splade", "minilm", "bert-base-random"
KEPT = 256


def model_folder(name: str, scratch: Path, texts: Sequence[str]) -> Path:
    """Folder of a model.

    Args:
        name: One of `TINY`, `MINILM`, `BASE`.
        scratch: Where to write one that is made here.
        texts: Documents that set the bias of `BASE`.
    """
    folder = scratch / name
    tiny = fetch("tiny-splade")
    shutil.copytree(tiny, folder)  # peers write their own files beside the weights
    if name == MINILM:
        write_minilm(folder)
    elif name == BASE:
        write_random_base(folder, texts)
    return folder


def write_minilm(folder: Path) -> None:
    """The documents' side of `vdr-mini` as BERT with a masked language model's head.

    Raises:
        RuntimeError: A part of the model is missing.
    """
    from transformers import BertConfig, BertForMaskedLM

    source = fetch("vdr-mini")
    saved = {name: part.float() for name, part in load_file(source / "model.safetensors").items()}
    config = BertConfig.from_pretrained(source, tie_word_embeddings=False)
    model = BertForMaskedLM(config)
    words = saved["bert.embeddings.word_embeddings.weight"]
    head = "cls.predictions."
    saved |= {
        f"{head}transform.dense.weight": saved["document.dense.weight"],
        f"{head}transform.dense.bias": saved["document.dense.bias"],
        f"{head}transform.LayerNorm.weight": saved["document.norm.weight"],
        f"{head}transform.LayerNorm.bias": saved["document.norm.bias"],
        f"{head}decoder.weight": words * saved["document.scale"][:, None],
        f"{head}decoder.bias": saved["document.bias"],
        f"{head}bias": saved["document.bias"],
    }
    missing = model.load_state_dict(saved, strict=False).missing_keys
    if set(missing) - {"bert.embeddings.position_ids"}:
        raise RuntimeError(f"vdr-mini has no {missing}")
    model.save_pretrained(folder)


def write_random_base(folder: Path, texts: Sequence[str]) -> None:
    """A BERT-base from a seed whose median document keeps `KEPT` columns."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=30522))
    model.save_pretrained(folder)
    encoder = SparseEncoder.from_pretrained(
        folder, device="cpu", runtime="torch", k=KEPT, activation="none"
    )
    vectors = encoder.encode_documents(list(texts[:9]))
    least = [float(vectors.row(i)[1].min()) for i in range(len(vectors))]
    with torch.no_grad():
        model.cls.predictions.bias -= sorted(least)[len(least) // 2]
    model.save_pretrained(folder)
