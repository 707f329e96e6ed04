"""What an error says holds no passwords, and nothing that a terminal would obey."""

import pytest

from t5lib.utils.errors import SourceError, T5Error, reason


@pytest.mark.parametrize("kind", [T5Error, SourceError])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hush@host/a@b: no", "https://…@host/a@b: no"),
        ("got 'http://hush@host:80'", "got 'http://…@host:80'"),
        ("https://me:a@hush@host?x=1", "https://…@host?x=1"),
        ("https://h/x?token=hush&b=2#c", "https://h/x?token=…&b=2#c"),
        ("url: /x?a=1&X-Amz-Signature=hush (Caused by", "url: /x?a=1&X-Amz-Signature=… (Caused by"),
        ("hf:owner/repo@main is not me@home", "hf:owner/repo@main is not me@home"),
    ],
)
def test_passwords_of_addresses_are_cut_out(kind, text, shown):
    assert str(kind(text)) == shown


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "No such file or directory"),
        (ConnectionError("Max retries (Caused by X('x: ([Errno -2] Name not known)'))"), "Name not known"),
        (ValueError("I/O error: No space left on device (os error 28)\nmore"), "I/O error: No space left on device"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_the_reason_is_a_systems_words_in_one_line(error, said):
    assert reason(error) == said


def test_what_a_terminal_would_obey_is_shown_in_its_place():
    said = str(T5Error("\x1b[2J\x9b1m\r \u202egnp\u2069 \udcff café 日本\nsecond line"))
    assert said == "\\x1b[2J\\x9b1m\\r \\u202egnp\\u2069 \\udcff café 日本\nsecond line"
