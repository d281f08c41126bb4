"""Whatever its own description allows, and does not, the service answers it without an error of its own."""

from __future__ import annotations

import contextlib
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
pytest.importorskip("schemathesis", reason="no schemathesis: pip install 'clipvisionalign[test]'")

#: Cases of each operation; `make test-all` asks some 900 in all.
CASES = int(os.environ.get("INTERFACE_CASES", "8"))


@pytest.mark.slow
def test_no_case_is_an_error_of_the_service(tmp_path, scenes_folder, tiny_runs):
    import schemathesis

    from clipvisionalign.search.indexer import build_index
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.server.app import create_app

    build_index(tiny_runs["late"], scenes_folder, tmp_path / "index", captions=True)
    described = schemathesis.openapi.from_asgi("/openapi.json", create_app([Searcher(tmp_path / "index")]))
    response_counts: Counter[tuple[str, int]] = Counter()

    def ask(operation, mode) -> None:
        @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check_response(case):
            response = case.call()
            response_counts[operation.label, response.status_code] += 1
            assert response.status_code < 500, response.text[:500]

        check_response()

    operations = [result.ok() for result in described.get_all_operations()]
    for operation in operations:
        ask(operation, schemathesis.GenerationMode.POSITIVE)
        # Cases that the description does not allow; there are none where nothing can be given.
        with contextlib.suppress(Unsatisfiable):
            ask(operation, schemathesis.GenerationMode.NEGATIVE)
    print(dict(response_counts))
    assert {label for label, _ in response_counts} == {operation.label for operation in operations}
    assert len(operations) >= 11
    assert response_counts.total() >= len(operations) * CASES
