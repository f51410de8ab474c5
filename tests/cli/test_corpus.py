"""The text behind the benchmark."""

from __future__ import annotations

import sys

import pytest

from sightline.cli.corpus import Corpus, documentation_strings, read_corpus


def test_default_text_is_the_same_every_time_and_long_enough():
    first, second = read_corpus(None, 20_000), read_corpus(None, 20_000)
    assert first == second
    assert len(first.tokens) == 20_000
    assert b"the" in first.tokens


def test_a_shorter_request_is_a_prefix():
    assert read_corpus(None, 20_000).tokens.startswith(read_corpus(None, 500).tokens)


def test_documentation_is_collected_in_order_without_importing(tmp_path):
    (tmp_path / "later.py").write_text("raise SystemExit\nclass C:\n  'a class'\n  def f(self): 'a method'\n")
    (tmp_path / "first.py").write_text("'''a module'''\nasync def g():\n  'a coroutine'\ndef undocumented(): pass\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/inside.py").write_text("'left out'")
    assert list(documentation_strings(tmp_path)) == ["a module", "a coroutine", "a class", "a method"]
    assert "later" not in sys.modules


def test_file_is_read_as_bytes_up_to_the_length(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("ä".encode() * 4)
    corpus = read_corpus(path, 5)
    assert corpus.tokens == b"\xc3\xa4\xc3\xa4\xc3"
    assert corpus.source == str(path)


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "text").touch()
    with pytest.raises(ValueError, match="empty"):
        read_corpus(tmp_path / "text", 5)


def test_context_starts_the_text_over():
    corpus = Corpus("here", b"abc")
    assert corpus.context(7) == b"abcabca"
    assert [corpus.repeats(length) for length in (1, 3, 4, 7)] == [1, 1, 2, 3]
