"""The encoders of texts and images a run trains: loaded or made new, joined, and saved for use."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.encoders.image import ImageEncoder
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.image import ImageHead, ImageTower
from vdr_db.towers.image_body import ImageBody, VitBody, VitConfig
from vdr_db.towers.image_hybrid import HybridBody, HybridConfig
from vdr_db.towers.image_stem import IMAGENET_MEAN, IMAGENET_STD, read_published
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.models import in_dtype, load_start, start_folder
from vdr_db.training.settings import TrainConfig

__all__ = [
    "channel_statistics",
    "has_stem_states",
    "load_pair",
    "save_pair",
    "standardise",
    "trainable_pair",
]

POSITION_SPREAD = 0.02
STEM = "body.stem."
SMALLEST_DEVIATION = 1e-3


def load_pair(config: TrainConfig, image: ImageConfig, device: torch.device) -> CrossModalEncoder:
    """The encoders to train, float32, by the settings of texts, images and seed.

    Raises:
        ConfigError: A checkpoint cannot be loaded as configured, or the two do not fit together.
    """
    text = load_start(config.model, device, own_weights=not image.train_text)
    if text.own_weights is None:  # one tower for all texts, with vectors of length 1
        text.document_tower, text.norm = text.query_tower, True
    if image.start:
        side = ImageEncoder.from_pretrained(
            start_folder(image.start),
            device=device,
            k=image.k,
            tokenizer=text.tokenizer,
            runtime="torch",
        )
    else:
        side = _image_encoder(image, text, device, config.run.seed)
    if image.projection != "own":
        _check_widths(text, side, image.projection)
    if image.projection == "text":
        is_trained = image.train_text and not config.model.freeze_embeddings
        _share_matrix(text, side, is_trained=is_trained)
    return CrossModalEncoder(text, side)


def _image_encoder(
    settings: ImageConfig, text: SparseEncoder, device: torch.device, seed: int
) -> ImageEncoder:
    """A new encoder over the columns of the text side; the same seed gives the same weights."""
    sizes: dict[str, Any] = {
        "image_size": settings.size,
        "patch_size": settings.patch_size,
        "hidden_size": settings.hidden_size,
        "layers": settings.layers,
        "heads": settings.heads,
        "intermediate_size": settings.intermediate_size,
    }
    is_hybrid = settings.body == "hybrid"
    body: ImageBody
    if is_hybrid:
        output = text.query_tower.body.config.hidden_size
        body = HybridBody(HybridConfig(**sizes, output_size=output, contrast=settings.contrast))
    else:
        body = VitBody(VitConfig(**sizes))
    head = ImageHead(body.hidden_size, text.vocabulary.columns)
    tower = ImageTower(body, head)
    weights = _first_weights(tower, torch.Generator().manual_seed(seed))
    if is_hybrid:
        stem = read_published(Path(settings.stem))
        weights |= {f"{STEM}{name}": tensor for name, tensor in stem.state_dict().items()}
    weights |= _head_of(text, weights)
    for name in ("head.norm.weight", "head.norm.bias"):
        weights[name] = weights[name] * settings.head_scale
    tower.load_state_dict(weights, strict=True, assign=True)
    preprocessing = Preprocessing(
        size=settings.size,
        crop=settings.crop,
        mean=IMAGENET_MEAN if is_hybrid else CLIP_MEAN,
        std=IMAGENET_STD if is_hybrid else CLIP_STD,
    )
    return ImageEncoder(
        tower=tower.to(device).eval(),
        tokenizer=text.tokenizer,
        vocabulary=Vocabulary.from_tokenizer(text.tokenizer, text.vocabulary.kind),
        preprocessing=preprocessing,
        activation=settings.activation or text.activation,
        k=settings.k,
        norm=True,
        backend=text.backend,
    )


def _first_weights(tower: ImageTower, generator: torch.Generator) -> dict[str, Tensor]:
    """Norms 1 and 0, positions small, matrices so that a row keeps its size."""
    norms = {
        f"{name}.{part}"
        for name, module in tower.named_modules()
        if isinstance(module, nn.LayerNorm)
        for part in ("weight", "bias")
    }
    weights = {}
    for name, parameter in tower.named_parameters():
        if name.startswith(STEM):
            continue
        shape = parameter.shape
        if name in norms or name.endswith("bias"):
            weights[name] = torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
            continue
        spread = POSITION_SPREAD
        if not name.endswith("position"):
            spread = shape[1:].numel() ** -0.5
        weights[name] = torch.randn(shape, generator=generator) * spread
    return weights


def _head_of(text: SparseEncoder, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm and matrix of the text head, where the image head has the same shapes.

    States of patches then start at the scale that the rows of the matrix were trained for.
    """
    tower = text.query_tower
    norm = tower.head.norm
    assert isinstance(norm, nn.LayerNorm)
    theirs = {
        "head.norm.weight": norm.weight,
        "head.norm.bias": norm.bias,
        "head.projection": tower.plain_matrix(),
    }
    return {
        name: tensor.detach().clone()
        for name, tensor in theirs.items()
        if tensor.shape == weights[name].shape
    }


def _check_widths(text: SparseEncoder, image: ImageEncoder, projection: str) -> None:
    theirs, ours = text.query_tower.plain_matrix().shape, image.tower.head.projection.shape
    if theirs != ours:
        raise ConfigError(
            f"`image.projection: {projection}` needs an image encoder with states of width "
            f"{theirs[1]} and {theirs[0]} columns, as the text side has, got {list(ours)}; set "
            "`image.hidden_size` of a ViT, or set `image.projection: own`."
        )


def _share_matrix(text: SparseEncoder, image: ImageEncoder, *, is_trained: bool) -> None:
    words, matrix = text.query_tower.body.embeddings.word.weight, text.query_tower.plain_matrix()
    head = image.tower.head
    if not is_trained:
        head.projection = nn.Parameter(matrix.detach(), requires_grad=False)
    elif matrix.data_ptr() == words.data_ptr() and matrix.shape == words.shape:
        head.projection = words  # one parameter, which both sides train
    else:
        raise ConfigError(
            "`image.projection: text` with trained embeddings needs a text side whose matrix is "
            "its word embeddings, all of them; set `model.freeze_embeddings: true`, or "
            "`image.projection: own`."
        )


def channel_statistics(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[C]` of each channel of the stem, out of `[B, P, C]`.

    The deviation is that of the images' mean states.
    """
    means = states.mean(dim=1)
    return means.mean(dim=0), means.std(dim=0).clamp_min(SMALLEST_DEVIATION)


def standardise(body: HybridBody, mean: Tensor, deviation: Tensor) -> None:
    """Makes a new body see standardised channels: its random first map takes the scaling over.

    `mean` and `deviation` are `[C]`.
    """
    with torch.no_grad():
        narrow = body.narrow
        narrow.weight.div_(deviation)
        if narrow.bias is not None:
            narrow.bias.copy_(-narrow.weight @ mean)


def trainable_pair(
    encoder: CrossModalEncoder, config: TrainConfig, image: ImageConfig
) -> dict[str, nn.Parameter]:
    """Parameters to train, by name; all others are frozen."""
    parameters: dict[str, nn.Parameter] = {}

    def add(name: str, parameter: nn.Parameter, *, frozen: bool) -> None:
        parameter.requires_grad_(not frozen)
        if not frozen:
            parameters[name] = parameter

    words = encoder.text.query_tower.body.embeddings.word.weight
    is_given = image.projection != "own" or config.loss.objective == "dpr"
    for name, parameter in encoder.image.tower.named_parameters():
        if parameter is words:
            continue  # of the text side
        is_stem = has_stem_states(encoder) and name.startswith(STEM)
        is_matrix = name == "head.projection" and is_given
        add(f"image.{name}", parameter, frozen=is_stem or is_matrix)
    for name, parameter in encoder.text.query_tower.named_parameters():
        is_word = name.endswith("word.weight") and config.model.freeze_embeddings
        add(f"text.{name}", parameter, frozen=is_word or not image.train_text)
    return parameters


def save_pair(encoder: CrossModalEncoder, folder: Path, dtype: torch.dtype) -> None:
    """Writes both encoders with weights of another dtype; the encoders stay as they are."""
    image = copy.copy(encoder.image)
    image.tower = copy.deepcopy(encoder.image.tower).to(dtype)
    text = in_dtype(encoder.text, dtype)
    CrossModalEncoder(text, image, model=encoder.model).save_pretrained(folder)


def has_stem_states(encoder: CrossModalEncoder) -> bool:
    """Whether images can be kept as states of a frozen stem."""
    return isinstance(encoder.image.tower.body, HybridBody)
