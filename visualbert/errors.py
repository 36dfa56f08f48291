"""Every error that a user can cause, one class per cause.

The command line catches `VisualBertError` alone, prints its text and exits with 2, so a message has
to say by itself what is wrong, where, what was expected, what was found, and the way out.
"""

from collections.abc import Iterable


class VisualBertError(Exception):
    """Base of all errors that this package raises on purpose."""

    ag_pass_through = True  # inside a tf.function, AutoGraph would raise another class in its place


class ConfigError(VisualBertError, ValueError):
    """A configuration is missing, broken, or contradicts itself."""


class CheckpointError(VisualBertError, ValueError):
    """A checkpoint cannot be read, or does not hold what the model needs."""


class InputError(VisualBertError, ValueError):
    """A model was called with inputs that do not fit it or each other."""


class MissingBackendError(VisualBertError, ImportError):
    """A framework or an optional library that the request needs is not installed."""


class HubError(VisualBertError, OSError):
    """A Hub id could not be resolved: no network, no such repository, or no access."""


class UsageError(VisualBertError, ValueError):
    """An option or argument that means nothing here."""


def did_you_mean(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """The end of a sentence about an unknown word: which of the `known` ones, `most` at most, may
    have been meant, if any.
    """
    import difflib

    known = sorted(known)
    close = [name for name in known if len(word) > 2 and word in name]
    if not 0 < len(close) <= most:
        close = difflib.get_close_matches(word, known, most, cutoff)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
