"""The two ways a user's input can be wrong; the command line turns them into one line and an exit status."""


class UsageError(ValueError):
    """A flag, a configuration value or a combination of them cannot work (exit status 2)."""


class DataError(ValueError):
    """An input file, record or checkpoint is missing, broken or contradicts itself (exit status 1)."""
