"""The one exception for a mistake of the user's, or for what this package refuses to guess."""

from __future__ import annotations


class UserError(ValueError):
    """One clear sentence that names what is wrong and the way out.

    The command line prints it as the last line on stderr and exits with status 2, without a
    traceback; in Python it is an ordinary ``ValueError``. Raised for bad input and for every
    architecture, dictionary or file that cannot be done exactly.

    >>> try:
    ...     graph.qk(layer=1, head=2, query=3, key=4)
    ... except ctqk.UserError as error:
    ...     print(str(error).partition(":")[0])
    key position 4 is after query position 3
    """
