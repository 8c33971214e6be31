# SPDX-License-Identifier: Apache-2.0
"""Text comes out in whole characters, stops where it should, and loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bedplate import demo
from bedplate.engine.text import StopStringMatcher, Tokenizer, has_tokenizer
from bedplate.errors import ConfigError, ModelNotFoundError


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(demo.path())


TEXTS = [
    "Hello, world",
    "👩‍👩‍👧 🇫🇷 e\u0301",
    "Привет, 你好 — こんにちは",
    "  two  spaces\n\ttabs",
    "12 + 30 = 42",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_pieces_are_whole_characters_and_add_up(tokenizer, text, step):
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer(tokenizer.encode("x"))
    pieces = [detokenizer.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_survives(text):
    tokenizer = _cached()
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    # Text that spells a special token is one, and is left out like one.
    assert "".join(detokenizer.push([i]) for i in ids) == tokenizer.decode(ids)


_kept: list[Tokenizer] = []


def _cached():
    if not _kept:
        _kept.append(Tokenizer(demo.path()))
    return _kept[0]


class Slow:
    """A tokenizer without a fast core: one byte a token, with a marker before each word."""

    def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        return bytes(ids).decode("utf-8", errors="replace")


def test_slow_tokenizers_keep_characters_whole_too(tokenizer):
    slow = Tokenizer.__new__(Tokenizer)
    slow._inner = Slow()
    text = "naïve 👩‍👧 text, and more of it than the window holds"
    detokenizer = slow.detokenizer(b"before ")
    pieces = [detokenizer.push([byte]) for byte in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert "<|im_start|>" not in tokenizer.detokenizer().push(ids)
    shown = tokenizer.detokenizer(skip_special_tokens=False).push(ids)
    assert shown.startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        (("END",), ["abc", "EN", "D and more"], "abc", "END"),
        (("END",), ["abcENx", "END"], "abcENx", "END"),
        (("END",), ["no stop ", "E"], "no stop E", None),
        (("aab",), ["aa", "aab"], "aa", "aab"),
        (("b", "abc"), ["xa", "bc"], "x", "abc"),  # the one that begins first
        (("abc", "bcd"), ["zabcd"], "z", "abc"),
        (("\n\n",), ["one\n", "two\n", "\nthree"], "one\ntwo", "\n\n"),
        ((), ["anything"], "anything", None),
    ],
)
def test_stop_strings(stops, pieces, shown, stopped):
    matcher = StopStringMatcher(stops)
    out, found = "", None
    for piece in pieces:
        text, found = matcher.push(piece)
        out += text
        if found is not None:
            break
    if found is None:
        out += matcher.flush()
    assert (out, found) == (shown, stopped)


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, size):
    matcher, out, found = StopStringMatcher(stops), "", None
    for start in range(0, len(text), size):
        piece, found = matcher.push(text[start : start + size])
        out += piece
        if found is not None:
            break
    else:
        out += matcher.flush()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    # Nothing of a stop string is shown, and nothing before the first one is lost.
    assert text.startswith(out)
    assert (found is None) == (not ends)
    if found is None:
        assert out == text
    else:
        assert not any(stop in out for stop in stops)
        assert text[len(out) :].startswith(found)


def test_nothing_is_held_back_that_cannot_become_a_stop_string():
    assert StopStringMatcher(("END",)).push("abcX") == ("abcX", None)
    assert StopStringMatcher(("END",)).push("abcE") == ("abc", None)


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    assert not has_tokenizer(tmp_path)
    assert has_tokenizer(demo.path())
    with pytest.raises(ModelNotFoundError, match="--tokenizer"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer._inner, "chat_template", None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_facts(tokenizer):
    assert tokenizer.vocab_size == 4096
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""
