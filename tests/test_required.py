from __future__ import annotations

import pytest
import required


@pytest.mark.parametrize("ask", [lambda: required.missing("no compiler"), lambda: required.module("no_such_module")])
def test_what_is_missing_skips_a_test_and_is_an_error_under_ci(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no compiler|no_such_module"):
        ask()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"which \.ci/run needs"):
        ask()


def test_a_module_that_is_there_is_imported() -> None:
    assert required.module("required") is required


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [("Skipped: could not import 'triton': no module", "failed"), ("Skipped: this device has no such unit", "skipped")],
)
def test_a_file_skipped_for_want_of_a_module_is_an_error_under_ci(
    reason: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    report = pytest.CollectReport("test_some.py", "skipped", ("test_some.py", 3, reason), [])
    required.fail_where_a_module_is_missing(report)
    assert report.outcome == "skipped"
    monkeypatch.setenv("CI", "true")
    required.fail_where_a_module_is_missing(report)
    assert report.outcome == outcome
