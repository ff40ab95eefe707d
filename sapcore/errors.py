"""One error class for what a user can mend: its message says what was wrong and what is allowed."""


class SapcoreError(ValueError):
    """Bad input or a missing file. The message is one sentence, fit to be shown without a traceback."""
