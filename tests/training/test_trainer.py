"""The loop: gradient caching, resuming after a kill, learning something, and its files."""

import json
import shutil

import pytest
import torch
import training_samples
from training_samples import settings, train

from vdr_db import SparseEncoder
from vdr_db.errors import ConfigError, InputError
from vdr_db.training.texts import TextTask
from vdr_db.training.watch import read_log


def weights(output):
    return SparseEncoder.from_pretrained(output / "model").named_tensors()


def assert_same(left, right, atol):
    for name, tensor in weights(left).items():
        torch.testing.assert_close(weights(right)[name], tensor, rtol=0, atol=atol, msg=name)


OBJECTIVES = {
    "vdr": {"objective": "vdr"},
    "svdr": {"objective": "svdr"},
    "gated": {"objective": "vdr", "gate_documents": True, "flops_document": 1e-3},
    "splade": {"objective": "infonce", "flops_query": 1e-3, "flops_document": 1e-3},
    "copied": {"objective": "vdr", "gate_documents": True, "imitation": 1.0, "kl": 0.1},
    "dpr": {"objective": "dpr"},
}
QUIET = {"lr": 1e-3, "eps": 1e-3}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_caching_changes_nothing_but_memory(tmp_path, name):
    """Also with dropout: both passes of a chunk draw the same."""
    loss = {"temperature": 10.0, **OBJECTIVES[name]}
    run = {"steps": 2, "batch_size": 8, "dropout": 0.0}
    teacher = {"kind": "encoder", "path": str(tmp_path / "bert"), "activation": "log1p_relu"}
    for chunk, output in ((0, "whole"), (3, "chunks")):
        train(
            settings(
                tmp_path,
                loss=loss,
                optimiser=QUIET,
                run={**run, "chunk": chunk},
                teachers=[teacher] if name == "copied" else [],
            ),
            tmp_path / output,
        )
    assert_same(tmp_path / "whole", tmp_path / "chunks", 1e-5)


def test_dropout_draws_the_same_in_both_passes_of_a_chunk(tmp_path, monkeypatch):
    """A gradient out of two different draws would not be that of the loss: differences tell."""
    configuration = settings(
        tmp_path, run={"chunk": 4, "dropout": 0.3, "steps": 1, "batch_size": 8}
    )
    seen = []
    encode = TextTask._encode

    def spy(task, job, seed):
        vectors = encode(task, job, seed)
        seen.append(vectors.leaves()[0].detach().clone())
        return vectors

    monkeypatch.setattr(TextTask, "_encode", spy)
    train(configuration, tmp_path / "out")
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right)


def test_accumulation_is_the_mean_of_batches(tmp_path):
    configuration = settings(tmp_path, run={"accumulate": 2, "steps": 2, "batch_size": 4})
    outcome = train(configuration, tmp_path / "out")
    assert outcome.steps == 2
    assert [row["step"] for row in read_log(tmp_path / "out" / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("when", [2, 3, 5])
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path, when):
    """SIGKILL right after a step, before and after checkpoints at steps 2 and 4."""
    configuration = settings(
        tmp_path,
        data={"train": [{"path": str(tmp_path / "pairs.tsv")}], "negatives": 1, "buffer": 20},
        optimiser={"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
        run={"steps": 6, "checkpoint_every": 2, "dropout": 0.2, "accumulate": 2, "batch_size": 8},
    )
    train(configuration, tmp_path / "whole")
    job = {"what": "train", "settings": configuration, "output": str(tmp_path / "killed")}
    # Sums of gradients are cut by threads: the same bits need the same number of them.
    threads = torch.get_num_threads()
    assert training_samples.run_worker({**job, "kill_at": when}, threads=threads) == [-9]
    train(configuration, tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed", 0)

    def losses(output):
        return [(row["step"], row["loss"], row["lr"]) for row in read_log(output / "log.jsonl")]

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(settings(tmp_path), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"optimiser.lr was 0.001, now 0.002"):
        train(settings(tmp_path, optimiser={"lr": 2e-3}), tmp_path / "out")
    # A longer log or other checkpoints change nothing that is learnt.
    train(settings(tmp_path, run={"log_every": 5}), tmp_path / "out")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            {"data": {"prefetch": 2, "train": {"split": "train"}}, "run": {"keep_checkpoints": 9}},
            "",
        ),
        ({"evaluation": {"patience": 0, "split": "test"}, "model": {"encode_lexical": False}}, ""),
        ({"model": {"encode_lexical": True}}, "model.encode_lexical was True, now False"),
        ({"data": {"train": {"split": "dev"}}}, "data.train.split was 'dev', now 'train'"),
    ],
)
def test_a_checkpoint_of_an_older_version_goes_on(tmp_path, gone, message):
    """Settings it holds that are gone, or lacks, count as their defaults."""
    train(settings(tmp_path), tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-5" / "state.pt"
    state = torch.load(file, weights_only=True)
    for section, values in gone.items():
        for name, value in values.items():
            if name == "train":
                state["settings"]["data"]["train"][0].update(value)
            else:
                state["settings"][section][name] = value
    del state["settings"]["image"], state["settings"]["optimiser"]["ema_decay"]
    state["position"]["stale"] = 0
    torch.save(state, file)
    if not message:
        assert train(settings(tmp_path), tmp_path / "out").steps == 5
        return
    with pytest.raises(ConfigError, match=message):
        train(settings(tmp_path), tmp_path / "out")


def test_a_finished_run_is_lengthened(tmp_path):
    run = {"steps": 2, "checkpoint_every": 1, "log_every": 1}
    optimiser = {"schedule": "constant"}
    train(settings(tmp_path, run=run, optimiser=optimiser), tmp_path / "out")
    longer = settings(tmp_path, run={**run, "steps": 4}, optimiser=optimiser)
    assert train(longer, tmp_path / "out").steps == 4
    train(longer, tmp_path / "whole")
    out, whole = (read_log(tmp_path / name / "log.jsonl") for name in ("out", "whole"))
    assert [row["loss"] for row in out] == [row["loss"] for row in whole]
    with pytest.raises(ConfigError, match="has 4 steps behind it, and 2 were asked for"):
        train(settings(tmp_path, run=run, optimiser=optimiser), tmp_path / "out")


def test_nobody_to_imitate_is_said(tmp_path):
    for teachers in ([], [{"kind": "bm25"}]):
        configuration = settings(tmp_path, loss={"imitation": 1.0}, teachers=teachers)
        with pytest.raises(
            ConfigError, match=r"`loss.imitation` needs a teacher of kind `encoder`"
        ):
            train(configuration, tmp_path / "out")


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(settings(tmp_path), tmp_path / "out")
    (tmp_path / "out" / "checkpoint-5" / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="checkpoint-5 cannot be read"):
        train(settings(tmp_path), tmp_path / "out")


def test_two_towers_frozen_embeddings_and_saved_dtype(tmp_path):
    model = {"shared": False, "freeze_embeddings": True, "save_dtype": "float16"}
    train(settings(tmp_path, model=model), tmp_path / "out")
    encoder = SparseEncoder.from_pretrained(tmp_path / "out" / "model")
    start = SparseEncoder.from_pretrained(tmp_path / "bert", activation="elu1p")
    assert not encoder.is_shared
    before = start.document_tower.body.embeddings.word.weight
    after = encoder.query_tower.body.embeddings.word.weight
    torch.testing.assert_close(after, before.half().float())
    files = (tmp_path / "out" / "model").rglob("model.safetensors")
    size = sum(file.stat().st_size for file in files)
    numbers = sum(tensor.numel() for tensor in encoder.named_tensors().values())
    assert size < 2 * numbers + 20_000


def test_the_written_model_may_keep_a_share_of_the_first_weights(tmp_path):
    """Training itself must not see the mix: not its steps, not its checkpoints."""
    run = {"steps": 4, "checkpoint_every": 2}
    train(settings(tmp_path, run=run), tmp_path / "all")
    train(settings(tmp_path, run=run, model={"trained_share": 0.25}), tmp_path / "quarter")
    first = SparseEncoder.from_pretrained(tmp_path / "bert", activation="elu1p").named_tensors()
    trained, mixed = weights(tmp_path / "all"), weights(tmp_path / "quarter")
    assert any(not torch.equal(tensor, first[name]) for name, tensor in trained.items())
    for name, tensor in mixed.items():
        expected = 0.25 * trained[name] + 0.75 * first[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)

    def losses(output):
        return [row["loss"] for row in read_log(output / "log.jsonl") if "loss" in row]

    assert losses(tmp_path / "all") == losses(tmp_path / "quarter")


@pytest.mark.parametrize("share", [0, 1.5, -1])
def test_a_share_beyond_its_bounds_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match=r"trained_share. must be above 0 and at most 1"):
        train(settings(tmp_path, model={"trained_share": float(share)}), tmp_path / "out")


def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(tmp_path):
    configuration = settings(tmp_path, run={"steps": 4, "checkpoint_every": 2})
    train(configuration, tmp_path / "out")
    (last,) = (tmp_path / "out").glob("checkpoint-4")
    shutil.rmtree(last)
    state_file = tmp_path / "out" / "checkpoint-2" / "state.pt"
    state = torch.load(state_file, weights_only=True)
    state["position"]["seconds"] = 1000.0
    torch.save(state, state_file)
    assert train(configuration, tmp_path / "out").seconds > 1000


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_autocast_learns_the_same_within_its_precision(tmp_path, precision):
    for name, run in (("full", {}), ("half", {"precision": precision})):
        train(settings(tmp_path, optimiser=QUIET, run=run), tmp_path / name)
    assert_same(tmp_path / "full", tmp_path / "half", 5e-3)


def test_float16_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="float16"):
        train(settings(tmp_path, run={"precision": "float16"}), tmp_path / "out")


def test_bad_data_ends_the_run_with_its_line(tmp_path):
    configuration = settings(tmp_path)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(pairs.read_text() + "no tab here\n")
    with pytest.raises(InputError, match=r"pairs.tsv:121: expected query and positive"):
        train(configuration, tmp_path / "out")
    configuration["data"]["on_bad"] = "skip"
    assert train(configuration, tmp_path / "out").skipped == 1


def test_the_best_model_is_kept(tmp_path):
    configuration = settings(tmp_path)
    folder = tmp_path / "held"
    (folder / "qrels").mkdir(parents=True)
    lines = (tmp_path / "pairs.tsv").read_text().splitlines()[:20]
    pairs = [line.split("\t")[:2] for line in lines]
    for file, column in (("queries.jsonl", 0), ("corpus.jsonl", 1)):
        rows = (json.dumps({"_id": str(i), "text": p[column]}) for i, p in enumerate(pairs))
        (folder / file).write_text("\n".join(rows))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(20)))
    configuration["evaluation"] = {"folder": str(folder), "every": 1}
    configuration["optimiser"] = {"lr": 0.0}
    outcome = train(configuration, tmp_path / "out")
    assert (outcome.steps, outcome.best_step) == (5, 1)
    assert outcome.best == pytest.approx(outcome.first["ndcg@10"])
    assert (tmp_path / "out" / "model" / "vdr_db.json").is_file()
