"""The one exception that a user's mistake raises."""

from collections.abc import Iterable
import difflib


class UsageError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what would be right.

    Entry points print it without a traceback and exit with status 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean 'x'?`` for the nearest of ``known``, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
