"""The package's own exceptions; messages read `function: argument got ..., wanted ...` and name the layer."""


class Error(Exception):
    """Base of all errors raised on purpose by structadmm."""


class PlanError(Error, ValueError):
    """A plan, recipe or ADMM call that cannot be carried out."""


class TraceError(Error, RuntimeError):
    """A model that cannot be traced."""


class CompactError(Error, RuntimeError):
    """A model that cannot be compacted exactly."""


class OptimizeError(Error, RuntimeError):
    """A network that cannot be optimised."""


class ArtefactError(Error, ValueError):
    """A file that is not a whole, untampered artefact."""
