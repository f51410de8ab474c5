"""docs/transformers.md says what the tests test, no more and no less."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script that writes the page, at work on a copy of it."""
    spec = importlib.util.spec_from_file_location("transformers_page", ROOT / "tools" / "transformers_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    copy = tmp_path / "docs" / "transformers.md"
    copy.parent.mkdir()
    copy.write_text(module.PAGE.read_text())
    monkeypatch.setattr(module, "PAGE", copy)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["transformers_page.py", *arguments])
    return script.main()


def test_page_is_up_to_date(script, monkeypatch):
    assert call(script, monkeypatch, "--check") == 0, "run python tools/transformers_page.py"


def test_page_that_was_changed_by_hand_is_found_and_written_anew(script, monkeypatch, capsys):
    written = script.PAGE.read_text()
    changed = written.replace("| ViT | images | yes |", "| ViT | images | · |")
    assert changed != written
    script.PAGE.write_text(changed)
    assert call(script, monkeypatch, "--check") == 1
    assert "docs/transformers.md is out of date" in capsys.readouterr().err
    assert script.PAGE.read_text() == changed
    assert call(script, monkeypatch) == 0
    assert script.PAGE.read_text() == written
