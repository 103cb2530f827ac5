"""Text that others wrote (labels, tokens) as one clean line, for terminals, notebooks and figures."""

from __future__ import annotations


def one_line(text: str, width: int | None = None) -> str:
    r"""A text on one line of characters that can all be printed, at most ``width`` of them.

    White space counts as one blank. Control characters, lone surrogates and the like are escaped
    as Python's ``repr`` escapes them.

    >>> one_line("red \x1b[31m\n and more", 40), one_line("a long label", 8)
    ('red \\x1b[31m and more', 'a long..')
    """
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if width is None or len(text) <= width:
        return text
    return text[: max(width - 2, 0)] + ".."
