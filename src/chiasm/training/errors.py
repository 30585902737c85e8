"""The fault of a run."""


class TrainingError(RuntimeError):
    """A fault that stops a run, told in one line; what was saved before is intact."""
