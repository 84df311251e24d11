"""The models of `bench_peers.py`: folders as the hub has them, which every library opens.

Nothing is downloaded but the tiny SPLADE. `vdr-mini` is the shipped model without own weights; its
head reads the mean of a text, for which other libraries have no name. `minilm`, of
`bench_checkouts.py`, has its body and weights with the head of masked language models, which
every checkout opens. `bert-base-random` has
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

TINY, MINI, MINILM, BASE = "tiny-splade", "vdr-mini", "minilm", "bert-base-random"
KEPT = 256
WEIGHTS = "model.safetensors"


def model_folder(name: str, scratch: Path, texts: Sequence[str]) -> Path:
    """Folder of a model.

    Args:
        name: One of `TINY`, `MINI`, `MINILM`, `BASE`.
        scratch: Where to write one that is made here.
        texts: Documents that set the bias of `BASE`.
    """
    folder = scratch / name
    # A copy: peers write their own files beside the weights.
    shutil.copytree(fetch(MINI if name == MINI else TINY), folder)
    if name == MINILM:
        write_minilm(folder)
    elif name == BASE:
        write_random_base(folder, texts)
    return folder


class MeanScores(torch.nn.Module):
    """The documents' side of `vdr-mini`, without own weights: ids `[1, L]` to weights `[1, V]`.

    Args:
        folder: The model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        saved = {name: part.float() for name, part in load_file(folder / WEIGHTS).items()}
        config = BertConfig.from_pretrained(folder, attn_implementation="eager")
        self.body = BertModel(config, add_pooling_layer=False).eval()
        body = {name[5:]: part for name, part in saved.items() if name.startswith("bert.")}
        self.body.load_state_dict(body, strict=True)
        width = config.hidden_size
        self.dense, self.norm = torch.nn.Linear(width, width), torch.nn.LayerNorm(width)
        self.decoder = torch.nn.Linear(width, config.vocab_size)
        with torch.no_grad():
            for part, name in ((self.dense, "dense"), (self.norm, "norm")):
                part.weight.copy_(saved[f"document.{name}.weight"])
                part.bias.copy_(saved[f"document.{name}.bias"])
            words = self.body.embeddings.word_embeddings.weight
            self.decoder.weight.copy_(words * saved["document.scale"].clamp_min(0)[:, None])
            self.decoder.bias.copy_(saved["document.bias"])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Weights of all dimensions."""
        states = self.body(input_ids=input_ids).last_hidden_state
        return torch.log1p(torch.relu(self.decoder(self.norm(self.dense(states.mean(1))))))


def write_minilm(folder: Path) -> None:
    """The documents' side of `vdr-mini` as BERT with a masked language model's head.

    Raises:
        RuntimeError: A part of the model is missing.
    """
    from transformers import BertConfig, BertForMaskedLM

    source = fetch("vdr-mini")
    saved = {name: part.float() for name, part in load_file(source / WEIGHTS).items()}
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
