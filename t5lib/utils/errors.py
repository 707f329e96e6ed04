"""Errors meant for the user: each message says what came, what was expected, and the remedy."""


class T5Error(Exception):
    """A problem the user can mend; printed without a traceback."""


class SourceError(T5Error):
    """Weights or data could not be fetched. `retryable` is true when trying again later may help."""

    def __init__(self, message: str, *, retryable: bool = False):
        super().__init__(message)
        self.retryable = retryable
