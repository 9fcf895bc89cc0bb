"""The exceptions that more than one module raises."""


class SubspaceError(ValueError):
    """A subspace that is malformed, or that does not fit the model or the options it is used with."""


class UnsupportedLayout(SubspaceError):
    """A weight's sharding cannot be read. The message says why and what to do."""
