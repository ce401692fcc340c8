"""The exceptions that are fastbn's own, and the rule for all others.

TypeError
    What was given is of the wrong kind: integer, boolean, complex or object data, a dtype that does not go with x.
ValueError
    The right kind with a wrong value: rank, axis, shape, channel count, eps, an `out` that overlaps x.
RuntimeError
    The right call at the wrong time: backward before forward.
"""

import sys

sys.modules["fastbn.errors"] = sys.modules[__name__]  # where pickles of exceptions look for them


class BackendUnavailable(RuntimeError):
    """An explicit request for a backend that can't be served.

    Says what was asked, what is registered and why each declines.
    """


class DataError(ValueError):
    """A file that is not what its name promises: truncated, of another format, or absent."""


class MissingExtra(ImportError):
    """A package that only an extra installs is absent; says which, and how to install it."""
