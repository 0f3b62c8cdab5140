"""The one exception that the command shows as a single line, and names as one line can show them."""

import unicodedata


def printable(name: str) -> str:
    r"""A name with escapes for what no line of text can hold: control characters, and bytes that are not UTF-8.

    >>> printable("caf\udce9\n")
    'caf\\xe9\\n'
    """
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name)


def _escaped(character: str) -> str:
    code = ord(character)
    # Python keeps byte b of a name that is not UTF-8 as the character 0xDC00 + b.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


class UserError(Exception):
    """A mistake that the user can correct (a path, an option, a damaged file): shown without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())
