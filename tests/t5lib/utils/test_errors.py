"""What an error says holds no passwords."""

import pytest

from t5lib.utils.errors import SourceError, T5Error


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
