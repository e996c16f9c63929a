"""Errors of the runtime. Each message is one sentence or two: the value, the reason, what to do."""


class ArtifactError(Exception):
    """The artifact cannot be loaded: not an artifact, damaged, or of a newer format."""


class InputError(ValueError):
    """What was passed to the model cannot be used; nothing was changed."""


class CacheFull(RuntimeError):
    """The next tokens do not fit, even at the final bits; raised before anything is changed."""
