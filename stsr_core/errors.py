"""The exception tree.

    StsrError
    |-- OperatorError            something outside the code must change; the message says what
    |   |-- ConfigurationError   catalog.yaml, settings or arguments
    |   |-- SourceError          input that cannot be read, or not be read safely
    |   |-- GridError            grids that do not fit each other
    |   |-- FactorError          no factor configuration serves the request
    |   |-- CheckpointError      weights or card that cannot be trusted
    |   |-- StoreError           a store that is missing, damaged, taken or full
    |   |-- GateError            an ensemble that must not be published
    |   `-- PublicationError     a catalogue that refuses the new version
    `-- ProgrammingError         a defect of this code or of its caller
        |-- ShapeError           arrays whose shapes do not belong together
        `-- ClosureError         a coarse total that cannot be, or was not, conserved

What only one stage raises is defined there: TrainingError, RedeployError, and those of `catalog/documents.py` and
`catalog/publish.py`, all of them an OperatorError, and ShardError, of a shard that could not be made.

Every message says what was found, what is needed and what to do.
"""


class StsrError(Exception):
    """Root of all errors this package raises on purpose."""


class OperatorError(StsrError):
    """Something outside the code must change."""


class ConfigurationError(OperatorError):
    """catalog.yaml, settings or arguments do not say something that can be done."""


class SourceError(OperatorError):
    """Input that cannot be read, or not be read without guessing."""


class GridError(OperatorError):
    """Grids that do not fit each other."""


class FactorError(OperatorError):
    """No factor configuration serves the request."""


class CheckpointError(OperatorError):
    """Weights or card that cannot be trusted."""


class StoreError(OperatorError):
    """A store that is missing, damaged, taken or full."""


class GateError(OperatorError):
    """An ensemble that must not be published."""


class PublicationError(OperatorError):
    """A catalogue that refuses the new version."""


class ProgrammingError(StsrError):
    """A defect of this code or of its caller."""


class ShapeError(ProgrammingError):
    """Arrays whose shapes do not belong together."""


class ClosureError(ProgrammingError):
    """A coarse total that cannot be, or was not, conserved."""


class WithdrawnWarning(UserWarning):
    """A version that its publisher withdrew is opened."""
