"""The one exception for a mistake of the user's, or for what this package refuses to guess."""

from __future__ import annotations


class UserError(ValueError):
    """One clear sentence that names what is wrong and the way out.

    The command line prints it as the last line on stderr and exits with status 2, without a
    traceback; in Python it is an ordinary ``ValueError``. Raised for bad input and for every
    architecture, dictionary or file that cannot be done exactly.
    """
