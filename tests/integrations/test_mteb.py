"""mteb evaluates our encoders, and finds what it finds with the library a model was made for."""

from __future__ import annotations

import json

import hub_layouts as hub
import pytest

from vdr_db.encoders.text import SparseEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of mteb and of its data sets
]


@pytest.fixture(scope="module")
def mteb():
    """Imported here: it takes seconds, which only the process that runs these tests need spend."""
    return pytest.importorskip("mteb")


def score(mteb, model, task) -> float:
    """nDCG@10 of a model on a task whose data lie in the package."""
    found = mteb.evaluate(
        model, task, cache=None, overwrite_strategy="always", raise_error=True, co2_tracker=False
    )
    scores = json.loads(json.dumps(found.task_results[0].scores))
    return next(iter(scores.values()))[0]["ndcg_at_10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hub.ROWS["8 opensearch doc-v2"](tmp_path_factory.mktemp("mteb") / "m")


@pytest.mark.parametrize("kind", ["retrieval", "reranking"])
def test_scores_are_those_of_sentence_transformers(mteb, folder, kind):
    from mteb.mocks.mock_tasks import reranking, retrieval
    from mteb.models.sentence_transformer_wrapper import SparseEncoderWrapper

    from vdr_db.integrations.mteb import MtebModel

    tasks = {"retrieval": retrieval.MockRetrievalTask, "reranking": reranking.MockRerankingTask}
    make = tasks[kind]
    ours = MtebModel(SparseEncoder.from_pretrained(folder, device="cpu"))
    theirs = SparseEncoderWrapper(str(folder), device="cpu")
    found = score(mteb, ours, make())
    assert found == pytest.approx(score(mteb, theirs, make()))
    assert found > 0


def test_an_encoder_is_loaded_by_its_folder(mteb, folder):
    from vdr_db.integrations.mteb import MtebModel

    model = MtebModel(str(folder), device="cpu")
    assert isinstance(model, mteb.EncoderProtocol)
    assert model.mteb_model_meta.name.endswith("/m")
