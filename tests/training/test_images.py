"""Cross-modal training: loss, gradients, data errors, resuming, and learning from images."""

import json
import math

import model_folders
import numpy as np
import pytest
import torch
from shape_pictures import COLOURS, SHAPES, write_shapes

from vdr_db.cli.main import main
from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.encoders.image import ImageEncoder
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError, InputError
from vdr_db.training.checkpoint import find_checkpoint
from vdr_db.training.config import build_config, load_config
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.images.columns import sample_columns
from vdr_db.training.images.data import PairBatches, read_pairs
from vdr_db.training.images.models import load_pair, trainable_pair
from vdr_db.training.images.task import ImageTask
from vdr_db.training.images.vectors import DenseHeads, ImageSide, TextSide
from vdr_db.training.images.watch import ranks, recalls
from vdr_db.training.objective import Objective
from vdr_db.training.settings import LossConfig
from vdr_db.training.trainer import Trainer
from vdr_db.training.watch import read_log

CPU = torch.device("cpu")
FROZEN, TRAINED = ImageConfig(), ImageConfig(train_text=True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Pairs to train on, unseen images of the same things, and a text model."""
    folder = tmp_path_factory.mktemp("shapes")
    model_folders.write_bert(folder / "bert")
    write_shapes(folder, "train", each=24)
    write_shapes(folder, "unseen", each=1, seed=1)
    return folder


def plain_settings(shapes, **changes):
    basis = {
        "model": {"start": str(shapes / "bert"), "activation": "elu1p", "k": 30, "query_k": 20},
        "image": {
            "body": "vit",
            "size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "layers": 1,
            "heads": 4,
            "intermediate_size": 64,
            "projection": "own",
            "k": 30,
        },
        "data": {"train": [{"path": str(shapes / "train.jsonl")}]},
        "loss": {"objective": "vdr", "temperature": 0.07},
        "optimiser": {"lr": 3e-3},
        "evaluation": {"folder": str(shapes / "unseen.jsonl")},
        "run": {"steps": 6, "batch_size": 8, "log_every": 1, "dropout": 0.0, "seed": 3},
    }
    for section, values in changes.items():
        basis[section] = {**basis[section], **values}
    return basis


def settings(shapes, **changes):
    return build_config(plain_settings(shapes, **changes))


def loaded(config):
    return load_pair(config, config.image, CPU)


def train(config, output, progress=None):
    return Trainer(ImageTask(config), output, device=CPU).run(progress)


# The loss


def cross_entropy(scores):
    """Mean over rows of -log softmax at the diagonal, in float64 loops."""
    total = 0.0
    for i, row in enumerate(scores):
        top = max(row)
        total += top + math.log(sum(math.exp(value - top) for value in row)) - row[i]
    return total / len(scores)


def symmetric(scores, temperature):
    scaled = np.asarray(scores, np.float64) / temperature
    return (cross_entropy(scaled) + cross_entropy(scaled.T)) / 2


@pytest.mark.parametrize("mask", [0.0, 0.3])
def test_the_loss_is_that_of_the_paper(shapes, mask):
    """Stated here in NumPy float64 from logits on: norm, gate, bags, mask, both directions."""
    config = settings(shapes, loss={"contrastive_mask": mask})
    both = loaded(config)
    texts = ["green sun", "blue book", "the light wave in water", "heavy star"]
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text_side = TextSide(both, TRAINED)
    image_side = ImageSide(both, FROZEN)
    objective = Objective(config.loss)
    found, parts = objective(
        text_side.encode(texts, objective.query_needs()), image_side.encode(pixels)
    )

    def elu1p(x):
        return np.where(x >= 0, x + 1, np.exp(np.minimum(x, 0)))

    with torch.no_grad():
        states = both.image.tower.head.norm(both.image.tower.body(pixels)).double().numpy()
        matrix = both.image.tower.head.projection.double().numpy()
    image = elu1p((states @ matrix.T).max(axis=1))
    image /= np.linalg.norm(image, axis=1, keepdims=True)

    whole = SparseEncoder.from_pretrained(
        shapes / "bert", activation="elu1p", k=None, query_k=None, device="cpu"
    )
    rows = whole.encode_queries(texts)
    bags = whole.bag_of_tokens(texts)
    columns = whole.vocabulary.columns
    text, bag = np.zeros((4, columns)), np.zeros((4, columns))
    for i in range(4):
        ids, weights = rows.row(i)
        weights = weights.astype(np.float64) / np.linalg.norm(weights.astype(np.float64))
        own = whole.vocabulary.id_to_column[bags.row(i)[0]]
        place = whole.vocabulary.id_to_column[ids]
        order = np.argsort(-weights, kind="stable")[:20]
        text[i, place[order]] = weights[order]
        dense = np.zeros(columns)
        dense[place] = weights
        text[i, own] = dense[own]
        bag[i, own] = 1 / math.sqrt(len(own))
    parametric = symmetric(text @ image.T, 0.07)
    masked, image_masked = bag, image
    if mask:
        unseen = (bag == 0).all(axis=0)
        owner = (np.arange(columns) % 4)[None, :] == np.arange(4)[:, None]
        masked = bag + mask * (owner & unseen)
        image_masked = image * ~(owner & unseen)
    lexical = symmetric(masked @ image_masked.T, 0.07)
    assert parts["parametric"] == pytest.approx(parametric, rel=1e-4)
    assert parts["lexical"] == pytest.approx(lexical, rel=1e-4)
    assert float(found.detach()) == pytest.approx((parametric + lexical) / 2, rel=1e-4)


def test_sampled_columns_estimate_the_length(shapes):
    """Scores keep their columns; the mean squared length over many draws is that of all columns."""
    both = loaded(settings(shapes))
    text_side, side = TextSide(both, FROZEN), ImageSide(both, FROZEN)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = text_side.encode(["green sun", "blue book", "heavy star"], {"gated", "bags"})
    with torch.no_grad():
        logits = side.logits(side.states(pixels))
        weights = torch.nn.functional.elu(logits) + 1
        squares = []
        for seed in range(300):
            torch.manual_seed(seed)
            rows, sample = sample_columns(texts, 20)
            assert rows.gated.width == len(sample.columns) < weights.shape[1]
            assert torch.equal(sample.columns[rows.gated.columns], texts.gated.columns)
            assert torch.equal(sample.columns[rows.bags.columns], texts.bags.columns)
            assert float(sample.counts.sum()) == pytest.approx(weights.shape[1], rel=1e-5)
            found = side.encode(pixels, sample).dense
            squares.append((weights[:, sample.columns] / found).square().mean(dim=1))
        everything = sample_columns(texts, weights.shape[1])[1]
        whole = side.encode(pixels).dense
        torch.testing.assert_close(side.encode(pixels, everything).dense, whole)
    expected = weights.square().sum(dim=1)
    torch.testing.assert_close(torch.stack(squares).mean(dim=0), expected, rtol=0.05, atol=0)


def test_gradients_are_those_of_the_formulas(shapes):
    both = loaded(settings(shapes))
    both.image.tower.double()
    side = ImageSide(both, FROZEN)
    head = both.image.tower.head
    states = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    projection = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)

    def vectors(states, projection):
        head.projection = torch.nn.Parameter(projection, requires_grad=False)
        pooled = torch.einsum("bph,vh->bpv", states, projection).amax(dim=1)
        weights = torch.nn.functional.elu(pooled) + 1
        return weights / weights.norm(dim=1, keepdim=True)

    assert torch.autograd.gradcheck(vectors, (states, projection))
    with torch.no_grad():
        expected = vectors(states, projection)
    torch.testing.assert_close(
        torch.nn.functional.normalize(torch.nn.functional.elu(side.logits(states)) + 1).double(),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )


# Data


def test_bad_lines_name_file_and_line(tmp_path, shapes):
    file = tmp_path / "pairs.jsonl"
    good = json.dumps({"image": "a.png", "text": "a"})
    (tmp_path / "a.png").write_bytes((shapes / "train/blue-sun-0.png").read_bytes())
    for bad, message in (
        ('{"image": "a.png"}', "`text` must be a text or a list of texts"),
        ('{"image": "a.png", "text": []}', "`text` must be a text or a list of texts"),
        ('{"image": "a.png", "text": [" "]}', "`text` must be a text or a list of texts"),
        ('{"image": 3, "text": "a"}', "`image` must be the path of an image"),
        ('{"image": "b.png", "text": "a"}', "the image b.png must lie in or below"),
    ):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(InputError, match=r"pairs\.jsonl.*2.*" + message):
            read_pairs(file)
        left_out = []
        assert len(read_pairs(file, on_bad=left_out.append)) == 1
        assert len(left_out) == 1


def test_a_damaged_image_names_the_line_of_its_pair(tmp_path, shapes):
    lines = (shapes / "train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "train").mkdir()
    for line in lines:
        name = json.loads(line)["image"]
        (tmp_path / name).write_bytes((shapes / name).read_bytes())
    (tmp_path / json.loads(lines[4])["image"]).write_bytes(b"no image")
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = settings(
        shapes,
        data={"train": [{"path": str(tmp_path / "train.jsonl")}]},
        run={"batch_size": 2, "steps": 40},
    )
    with pytest.raises(InputError, match=r"train\.jsonl.*5"):
        train(config, tmp_path / "out")


def test_batches_are_a_function_of_the_seed_and_hold_no_text_twice(shapes):
    batches = PairBatches([(shapes / "train.jsonl", 1.0)], 12, seed=5, views=2)
    first = list(batches.epoch(0))
    assert first == list(batches.epoch(0))
    assert first != list(batches.epoch(1))
    assert first[3:] == list(batches.epoch(0, skip=3))
    for batch in first:
        assert len({example.text for example in batch}) == 12
    numbers = [example.number for batch in first for example in batch]
    assert len(set(numbers)) == len(numbers) > 0.7 * len(batches.pairs)
    assert {example.view for batch in first for example in batch} == {0, 1, 2}


def test_too_few_pairs_for_a_batch_are_said(shapes):
    with pytest.raises(InputError, match="fewer than the 17 pairs with different texts"):
        PairBatches([(shapes / "train.jsonl", 1.0)], 17)


def test_ranks_count_ties_like_a_store():
    scores = np.array([[2.0, 2.0, 1.0], [3.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    assert ranks(scores).tolist() == [1, 2, 3]
    found = recalls(np.eye(20) + 1)
    assert found["text_to_image_r@1"] == found["image_to_text_r@10"] == found["ndcg@10"] == 1


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"objective": "svdr"}}, "must be 'vdr' or 'dpr'"),
        ({"loss": {"kl": 1.0}}, "takes no `loss.kl`"),
        ({"data": {"train": []}}, "at least one file of pairs"),
        ({"image": {"body": "hybrid"}}, "`image.stem` must name"),
        ({"image": {"dropout": 1.0}}, "`image.dropout` must be in"),
        ({"image": {"patch_dropout": 0.5}}, "0 without `image.as_one_patch`"),
        ({"image": {"patch_dropout": 1.0, "as_one_patch": True}}, r"must be in \[0, 1\)"),
        (
            {"loss": {"objective": "dpr"}, "image": {"dense": "matrix", "projection": "own"}},
            "`image.dense: matrix` needs a frozen text side",
        ),
        ({"image": {"sampled_columns": 9}, "loss": {"contrastive_mask": 0.1}}, "must be 0 with"),
        ({"image": {"width": 3}}, "unknown key `image.width`"),
    ],
)
def test_settings_that_cannot_work_are_refused(shapes, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(shapes, **changes)


def test_a_shared_matrix_needs_states_of_its_width(shapes):
    config = settings(shapes, image={"projection": "text", "hidden_size": 64})
    with pytest.raises(ConfigError, match="states of width 32"):
        loaded(config)


def test_both_sides_train_one_matrix(tmp_path, shapes):
    changes = {"image": {"projection": "text", "train_text": True}}
    config = settings(shapes, **changes)
    both = loaded(config)
    words = both.text.document_tower.body.embeddings.word.weight
    assert both.image.tower.head.projection is words
    names = trainable_pair(both, config, config.image)
    assert [name for name, parameter in names.items() if parameter is words] == [
        "text.body.embeddings.word.weight"
    ]
    train(config, tmp_path / "tied")
    trained = CrossModalEncoder.from_pretrained(tmp_path / "tied" / "model", device="cpu")
    assert trained.is_tied
    moved = trained.text.document_tower.body.embeddings.word.weight - words
    assert float(moved.detach().abs().max()) > 1e-3
    saved = json.loads((tmp_path / "tied/model/image/vdr_db_image.json").read_text())
    assert saved["projection"] == "text"
    part = settings(
        shapes, **changes, model={"start": str(shapes / "bert"), "vocabulary": "from_999"}
    )
    with pytest.raises(ConfigError, match="needs a text side whose matrix is its word embeddings"):
        loaded(part)


# Runs


@pytest.mark.parametrize("trained", [False, True], ids=["frozen texts", "trained texts"])
def test_half_precision_learns_the_same(tmp_path, shapes, trained):
    """Losses of bfloat16 bodies follow those of float32 within what 8 bits of mantissa leave."""
    losses = []
    for precision in ("float32", "bfloat16"):
        config = settings(shapes, image={"train_text": trained}, run={"precision": precision})
        train(config, tmp_path / precision)
        rows = read_log(tmp_path / precision / "log.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1][-1] < losses[1][0]


class Killed(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize(
    "changes",
    [
        {"image": {"train_text": True, "views": 1}},
        {"image": {"projection": "text"}, "loss": {"contrastive_mask": 0.1}},
        {"image": {"projection": "text", "sampled_columns": 20}},
        {"image": {"train_text": True, "sampled_columns": 20}},
        {"image": {"projection": "text", "train_text": True, "sampled_columns": 20}},
        {"loss": {"objective": "dpr"}, "image": {"train_text": True}},
    ],
    ids=["both", "tied", "sampled", "both sampled", "one matrix", "dense"],
)
def test_a_resumed_run_ends_like_one_that_never_stopped(tmp_path, shapes, changes):
    config = settings(shapes, **{**changes, "run": {"checkpoint_every": 2}})
    train(config, tmp_path / "whole")

    def kill(step, total, numbers):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "parts", kill)
    assert find_checkpoint(tmp_path / "parts").name == "checkpoint-4"
    train(config, tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint-6" / "state.pt")["state"]["model"]
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    losses = [
        [row["loss"] for row in read_log(tmp_path / name / "log.jsonl") if "loss" in row]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_it_learns_to_find_unseen_images(tmp_path, shapes):
    """Sixteen kinds of images; chance is R@1 1/16."""
    config = settings(
        shapes,
        image={"views": 0},
        model={"save_dtype": "float16"},
        optimiser={"lr": 5e-3, "warmup_steps": 20, "schedule": "cosine"},
        run={"steps": 300, "batch_size": 16, "log_every": 50},
    )
    outcome = train(config, tmp_path / "run")
    assert outcome.first["text_to_image_r@1"] < 0.3
    assert outcome.last["ndcg@10"] > 0.7
    assert outcome.last["text_to_image_r@5"] > 0.9
    assert outcome.last["image_to_text_r@5"] > 0.9

    # The saved model finds them too, with queries that need no model.
    encoder = CrossModalEncoder.from_pretrained(tmp_path / "run" / "model", device="cpu")
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    images = [shapes / "unseen" / f"{name.replace(' ', '-')}-0.png" for name in names]
    rows = encoder.encode_images(images).rows
    assert recalls(encoder.bag_of_tokens(names).dot(rows))["text_to_image_r@5"] > 0.9
    with torch.no_grad():
        alone = ImageEncoder.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert alone.encode_images(images).rows == rows


def test_a_cheap_warm_up_is_a_start_for_the_full_objective(tmp_path, shapes):
    shared = {"projection": "text", "k": 30}
    warm = settings(
        shapes,
        loss={"objective": "dpr"},
        image={**shared, "dense": "matrix"},
        optimiser={"lr": 5e-3, "warmup_steps": 20, "schedule": "cosine"},
        run={"steps": 200, "batch_size": 16},
    )
    assert train(warm, tmp_path / "warm").last["ndcg@10"] > 0.6
    start = str(tmp_path / "warm" / "model")
    config = settings(shapes, image={**shared, "start": start}, run={"steps": 1, "batch_size": 16})
    outcome = train(config, tmp_path / "run")
    untrained = settings(shapes, image=shared, run={"steps": 1, "batch_size": 16})
    assert outcome.first["ndcg@10"] > train(untrained, tmp_path / "raw").first["ndcg@10"] + 0.05


def test_a_dense_baseline_learns(tmp_path, shapes):
    config = settings(
        shapes,
        loss={"objective": "dpr"},
        image={"train_text": True},
        optimiser={"lr": 2e-3, "warmup_steps": 10},
        run={"steps": 100, "batch_size": 16, "log_every": 1},
    )
    outcome = train(config, tmp_path / "run")
    assert outcome.last["text_to_image_r@1"] > outcome.first["text_to_image_r@1"] + 0.2


def test_the_command_trains_and_writes_a_card(tmp_path, shapes, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(shapes, image={"train_text": True}).to_dict()))
    arguments = ["train", str(file), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"]
    assert main([*arguments, "--set", "run.steps=2", "--set", "optimiser.betas=[0.9, 0.98]"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2
    assert report["last"]["text_to_image_r@10"] >= 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "CrossModalEncoder.from_pretrained" in card
    assert "1 layers of width 32" in card
    assert str(shapes) not in card
    assert str(tmp_path) not in card
    assert load_config("vdr-cross-modal").image is not None


def test_dense_heads_are_the_same_in_every_run():
    assert torch.equal(DenseHeads(4, 6, seed=1).image, DenseHeads(4, 6, seed=1).image)
    assert LossConfig().objective == "vdr"
