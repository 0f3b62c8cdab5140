"""The one exception that the command shows as a single line."""


class UserError(Exception):
    """A mistake that the user can correct (a path, an option, a damaged file): shown without a traceback."""
