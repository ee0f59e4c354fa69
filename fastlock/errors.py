"""The one exception type that fastlock raises for what a user or a file got wrong."""


class FastlockError(Exception):
    """Something a user, a model or a file got wrong.

    The message says what was wrong, where, and what to do about it. A `FastlockError` never leaves
    half a result behind: the model or the file is as it was before the call.
    """
