"""What the stand-in of Elasticsearch alone proves, because no real OpenSearch can: a short list.

Read from the sources of the tests of connectors and of ingest: those that ask for the stand-in by
its fixture, and those that skip a real server.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
FIXTURES = {"stand_in", "noida_server"}
ONLY_STAND_IN = {
    "test_a_client_of_another_major_version_is_told_at_opening": "an Elasticsearch of version 8",
    "test_elasticsearch_and_opensearch_are_told_apart": "both products in turn, with a key",
    "test_a_busy_server_is_asked_again_by_the_store": "a root page that is busy for a while",
    "test_elasticsearch_of_the_environment": "$VDR_DB_ELASTICSEARCH_URL",
    "test_scores_and_order_are_those_of_nine_bit_weights": "its field type sparse_vector",
    "test_the_final_state_is_exact": "of eight kinds of faults, answers that come too late",
    "test_secrets_appear_nowhere": "a client of Elasticsearch that is made here",
    "project": "a serverless project of Elasticsearch",
}


def alone(function: ast.FunctionDef) -> bool:
    """Whether a test or fixture runs on the stand-in alone, at least for some parameter."""
    if FIXTURES & {argument.arg for argument in function.args.args}:
        return True
    return any(
        isinstance(node, ast.If)
        and "is_real" in (condition := ast.unparse(node.test))
        and not condition.startswith("not ")
        and any("pytest.skip" in ast.unparse(line) for line in node.body)
        for node in ast.walk(function)
    )


def test_what_only_the_stand_in_proves_is_listed_and_short():
    found = {
        node.name
        for folder in ("connectors", "ingest")
        for path in sorted((TESTS / folder).glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and alone(node)
    }
    assert found == set(ONLY_STAND_IN), "say here what no real server of the tests can show"
    assert len(found) <= 12
