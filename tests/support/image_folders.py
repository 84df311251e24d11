"""Cross-modal model folders and pictures; names and shapes from the files' own formats.

Nothing here knows the library under test.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from model_folders import BERT, Weights, bert_body, bert_tokenizer, bert_tokens, upstream_config
from safetensors.torch import save_file

VIT = {"resolution": 24, "patch_size": 8, "width": 32, "layers": 2, "heads": 4}
"""A tiny image encoder: 9 patches."""


def image_shapes(
    columns: int, *, resolution: int, patch_size: int, width: int, layers: int, **_: int
) -> dict[str, tuple[int, ...]]:
    """Name, without prefix -> shape of every weight of a published image encoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, patch_size, patch_size),
        "positional_embedding": ((resolution // patch_size) ** 2, width),
        "proj": (columns, width),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
    return shapes


def add_image_weights(weights: Weights, prefix: str, columns: int, vit: dict) -> None:
    for name, shape in image_shapes(columns, **vit).items():
        is_scale = ".weight" in name and len(shape) == 1
        spread = 0.05 if name == "conv1.weight" else 0.2
        weights.add(prefix + name, *shape, spread=spread, center=1.0 if is_scale else 0.0)


def write_cross_modal(
    folder: Path,
    *,
    schema: str = "2024",
    file: str = "safetensors",
    tokenizer=None,
    topk: int = 30,
    seed: int = 0,
    vit: dict | None = None,
    **image_settings: object,
) -> Path:
    """A cross-modal `Retriever` of the published VDR code: texts in `encoder_q`, images in `_p`."""
    tokenizer = tokenizer or bert_tokenizer()
    vocabulary = tokenizer.get_vocab()
    columns = sum(id >= 999 and token.isascii() for token, id in vocabulary.items())
    vit = vit or VIT
    weights = Weights(seed)
    bert_body(weights, "encoder_q.bert_model.", BERT, len(vocabulary), ("weight", "bias"))
    weights.norm("encoder_q.ln", BERT["hidden_size"])
    add_image_weights(weights, "encoder_p.", columns, vit)
    config = upstream_config(
        schema,
        shared=False,
        kind="vdr_crossmodal_text",
        num_attention_heads=4,
        hidden_size=BERT["hidden_size"],
        topk=topk,
    )
    kind = "vdr_cm_image" if schema == "spring 2024" else "vdr_crossmodal_image"
    config["encoder_p"] = {
        "type": kind,
        "tokenizer_id": "bert-base-uncased",
        "max_len": 49,
        "topk": topk,
        **vit,
        **image_settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    if file == "safetensors":
        save_file(weights.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights.tensors, folder / "pytorch_model.bin")
    return folder


def ascii_ids() -> list[int]:
    """Token ids of the columns of a cross-modal encoder with the small test vocabulary."""
    return [id for id, token in enumerate(bert_tokens()) if id >= 999 and token.isascii()]


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """`[height, width, 3]` uint8: smooth colours with some noise, as pictures have."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = generator.uniform(0.02, 0.2, (3, 2))
    smooth = np.stack([np.sin(a * x + b * y) for a, b in waves], axis=-1) * 100 + 128
    noisy = smooth + generator.normal(0, 8, (height, width, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
