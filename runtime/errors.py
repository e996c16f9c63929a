"""Errors of the runtime. Each message is one sentence or two: the value, the reason, what to do."""


class ArtifactError(Exception):
    """The artifact cannot be used: it is not an artifact, is damaged, or has another format version."""


class InputError(ValueError):
    """What was passed to the model cannot be used; nothing was changed."""


class CacheFull(RuntimeError):
    """The next tokens do not fit, even at the final bits; raised before anything is changed."""
