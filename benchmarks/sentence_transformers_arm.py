"""Texts to sparse vectors by sentence-transformers: as it is, and with this library's head.

The model has random weights and a made-up vocabulary: time does not depend on what they mean, and
nothing needs to be downloaded.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from kernel_cases import SEED, Arm


def encode_arms(device: torch.device, *, is_tiny: bool) -> list[tuple[Arm, str]]:
    """Arms that encode the same texts, and the name of their shape."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    V = 200 if is_tiny else 30522
    sizes = (
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64}
        if is_tiny
        else {}
    )  # fmt: skip
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{number}" for number in range(V - len(specials))]
    n_texts, longest = (4, 12) if is_tiny else (1024, 200)
    picker = random.Random(SEED)
    texts = [
        " ".join(picker.choices(words, k=picker.randint(longest // 8, longest)))
        for _ in range(n_texts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(specials + words))
        BertTokenizerFast(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        BertForMaskedLM(BertConfig(vocab_size=V, **sizes)).save_pretrained(folder)
        model = SparseEncoder(
            modules=[MLMTransformer(folder, max_seq_length=256), SpladePooling("max")],
            device=str(device),
        )
    model.eval()
    if device.type == "cuda":
        model.to(torch.bfloat16)
    shape = f"encode {n_texts} texts, BERT-base, V={V}" if not is_tiny else "encode, tiny"

    def encode() -> object:
        return model.encode(texts, batch_size=64, show_progress_bar=False)

    arms = [(Arm("encode", "sentence-transformers", encode, use_graph=False), shape)]
    from vdr_db.integrations.sentence_transformers import accelerate

    def encode_accelerated() -> object:
        with accelerate(model, backend="triton", check=False):
            return encode()

    arms.append((Arm("encode", "sentence-transformers + vdr_db head", encode_accelerated,
                     use_graph=False), shape))  # fmt: skip
    return arms
