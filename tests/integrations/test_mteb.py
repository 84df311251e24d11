"""mteb evaluates our encoders, and finds what it finds with the library a model was made for."""

from __future__ import annotations

import json

import hub_layouts as hub
import pytest

mteb = pytest.importorskip("mteb")

from mteb.mocks.mock_tasks import reranking, retrieval  # noqa: E402

from vdr_db.encoders.text import SparseEncoder  # noqa: E402
from vdr_db.integrations.mteb import MtebModel  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of mteb and of its data sets
]


def score(model, task) -> float:
    """nDCG@10 of a model on a task whose data lie in the package."""
    found = mteb.evaluate(
        model, task, cache=None, overwrite_strategy="always", raise_error=True, co2_tracker=False
    )
    scores = json.loads(json.dumps(found.task_results[0].scores))
    return next(iter(scores.values()))[0]["ndcg_at_10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hub.ROWS["8 opensearch doc-v2"](tmp_path_factory.mktemp("mteb") / "m")


@pytest.mark.parametrize("make", [retrieval.MockRetrievalTask, reranking.MockRerankingTask])
def test_scores_are_those_of_sentence_transformers(folder, make):
    from mteb.models.sentence_transformer_wrapper import SparseEncoderWrapper

    ours = MtebModel(SparseEncoder.from_pretrained(folder, device="cpu"))
    theirs = SparseEncoderWrapper(str(folder), device="cpu")
    found = score(ours, make())
    assert found == pytest.approx(score(theirs, make()))
    assert found > 0


def test_an_encoder_is_loaded_by_its_folder(folder):
    model = MtebModel(str(folder), device="cpu")
    assert isinstance(model, mteb.EncoderProtocol)
    assert model.mteb_model_meta.name.endswith("/m")
