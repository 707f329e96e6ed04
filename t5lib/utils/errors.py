"""Errors meant for the user: each message says what came, what was expected, and the remedy."""

import re
import unicodedata

_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|sig|password|passwd|credential)[\w.-]*=)[^&#\s'\")]+", re.I
)

_SYSTEM = re.compile(r"\[Errno -?\d+\] ([^()'\":]+)")


class T5Error(Exception):
    """A problem the user can mend; printed without a traceback, without passwords of addresses and without what a
    terminal would obey."""

    def __init__(self, message: str = ""):
        super().__init__(printable(without_secrets(message)))


class SourceError(T5Error):
    """Weights or data could not be fetched. `retryable` is true when trying again later may help."""

    def __init__(self, message: str, *, retryable: bool = False):
        super().__init__(message)
        self.retryable = retryable


def without_secrets(text: str) -> str:
    """`text` with user names and passwords of addresses, and secrets in their queries, cut out."""
    return _SECRET.sub(r"\1…", _USERINFO.sub("…@", text))


def reason(error: BaseException) -> str:
    """The message of an error of the system or of a library, in one line. For an error of the system, only its words:
    without its number, the path, and what a client wrapped around it."""
    said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    system = _SYSTEM.search(said)
    return system[1].strip() if system else re.sub(r" \(os error \d+\)", "", said) or type(error).__name__


def printable(text: str) -> str:
    """`text` with control characters, which names from files may hold, as Python writes them; line ends stay."""
    return "".join(
        repr(letter)[1:-1] if letter != "\n" and unicodedata.category(letter).startswith("C") else letter
        for letter in text
    )
