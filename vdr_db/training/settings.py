"""Settings of a training run as dataclasses; `vdr_db.training.config` reads them from YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from vdr_db.errors import ConfigError
from vdr_db.training.examples import Format
from vdr_db.training.losses import SYMMETRIES, Symmetry

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
        encode_max_length: Most tokens of a document when the trained model is used; None for as
            many as it has positions.
        encode_query_max_length: The same for queries; None for that of documents.
        encode_lexical: Whether the trained model keeps a text's own tokens in any case.
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
    encode_query_max_length: int | None = None
    encode_lexical: bool = False
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
    split: str = "train"


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on.

    Attributes:
        train: Files of examples.
        negatives: Hard negatives of each query.
        buffer: Examples held for shuffling.
        bucket: Batches sorted by length together; 1 turns it off.
        on_bad: Whether a bad line ends the run or is counted and left out.
        prefetch: Batches read and tokenised ahead by a thread; 0 for none.
    """

    train: tuple[FileConfig, ...] = ()
    negatives: int = 0
    buffer: int = 20_000
    bucket: int = 16
    on_bad: Literal["raise", "skip"] = "raise"
    prefetch: int = 4


@dataclass(frozen=True)
class TeacherConfig:
    """A model or formula whose scores of a batch's queries and documents are imitated.

    Attributes:
        kind: `"encoder"` runs a frozen sparse encoder, `"dense"` a sentence encoder with mean
            pooling and cosine; `"bm25"` scores with document frequencies of the training documents.
        path: Of the encoder: folder, hub id or a name of `vdr_db.checkpoints.assets`.
        activation: Of the encoder; None for the checkpoint's.
        query_activation: Of its queries; None for `activation`. A query with damped weights and a
            document with plain ones often rank better than both alike.
        k: Columns of its documents; None for all.
        query_k: The same of its queries.
        query_scale: Factor of the queries' weights. It changes no ranking, but what a student has
            to learn: best is the scale at which its first vectors are near the teacher's.
        length_power: Documents' weights are divided by (norm / `length_norm`) to this power: 0
            leaves them, 1 gives all documents one length.
        length_norm: L2 norm of a document whose weights stay as they are.
        lexical_query: Of the encoder: BM25's weights of a query, times this, are added to its own,
            after the scale.
        lexical_document: The same of documents, before they are divided by their length.
        mean_length: Tokens of a document of usual length for BM25; None for the mean of the
            training documents, which is no use where most of them are single sentences.
        weight: Of its scores in the sum of all teachers. Raw scores differ in size: 1 over their
            standard deviation within a batch gives each teacher an equal say.
    """

    kind: Literal["encoder", "dense", "bm25"] = "bm25"
    path: str = ""
    activation: Literal["elu1p", "log1p_relu", "double_log1p_relu", "none"] | None = None
    query_activation: Literal["elu1p", "log1p_relu", "double_log1p_relu", "none"] | None = None
    k: int | None = 256
    query_k: int | None = 128
    query_scale: float = 1.0
    length_power: float = 0.0
    length_norm: float = 1.0
    lexical_query: float = 0.0
    lexical_document: float = 0.0
    mean_length: float | None = None
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
        contrastive_mask: Weight of unseen columns in the bags; 0 turns it off.
        flops_query: Weight of the FLOPS regulariser of queries.
        flops_document: The same for documents.
        l1_query: Weight of the L1 norm of queries.
        l1_document: The same for documents.
        regulariser_warmup: Steps over which regularisers grow to full weight, with the square.
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
    l1_query: float = 0.0
    l1_document: float = 0.0
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
        split: Of its judgements.
        every: Steps between evaluations; 0 only at the end.
        queries: Most queries used, the first of the file; 0 for all.
        documents: Most documents: the judged ones of those queries, then the first of the file; 0
            for all.
        patience: Stop after that many evaluations without a better nDCG@10; 0 never.
    """

    folder: str = ""
    split: str = "test"
    every: int = 0
    queries: int = 0
    documents: int = 0
    patience: int = 0


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
        keep_checkpoints: Most checkpoints kept.
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
    keep_checkpoints: int = 2
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
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teachers: tuple[TeacherConfig, ...] = ()
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant together."""
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """As plain mappings and lists, what `config.build_config` takes."""
        return dataclasses.asdict(self)


def _check(config: TrainConfig) -> None:
    loss, run, optimiser = config.loss, config.run, config.optimiser
    positive = {
        "run.batch_size": run.batch_size,
        "run.accumulate": run.accumulate,
        "run.log_every": run.log_every,
        "run.keep_checkpoints": run.keep_checkpoints,
        "loss.temperature": loss.temperature,
        "loss.student_temperature": loss.student_temperature,
        "loss.teacher_temperature": loss.teacher_temperature,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"`{name}` must be above 0, got {value}.")
    not_negative = {
        "run.steps": run.steps,
        "run.epochs": run.epochs,
        "run.chunk": run.chunk,
        "run.checkpoint_every": run.checkpoint_every,
        "optimiser.lr": optimiser.lr,
        "optimiser.warmup_steps": optimiser.warmup_steps,
        "optimiser.clip": optimiser.clip,
        "data.prefetch": config.data.prefetch,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"`{name}` must not be negative, got {value}.")
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
    if loss.symmetry not in SYMMETRIES:
        raise ConfigError(f"`loss.symmetry` must be one of {SYMMETRIES}, got {loss.symmetry!r}.")
    if loss.objective == "dpr" and (config.teachers or loss.kl or loss.margin_mse):
        raise ConfigError("`loss.objective: dpr` takes no teachers here; leave them out.")
