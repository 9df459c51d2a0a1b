"""Everything the engine raises on purpose.

    EngineError                  category, code
    ├── SpecError                user      a field of a spec is impossible (also a ValueError)
    ├── DataError                user      a row of a dataset cannot be used (line, JSON path)
    ├── BaseModelError           platform  the base model's files are missing, torn or unsupported
    ├── AdapterError             user      adapter files do not fit together or to the base model
    ├── CheckpointError          platform  a checkpoint is torn, altered or of another job
    ├── WouldNotFit              capacity  the plan needs more memory than the device has
    ├── OutOfMemory              capacity  the device ran out of memory in spite of the plan
    └── Diverged                 user      loss or gradients stopped being finite

Each one survives pickling, so that it can cross a process boundary.
"""

from typing import Any, Literal

Category = Literal["user", "platform", "capacity"]


class EngineError(Exception):
    """Base of the tree. `code` is stable and machine-readable, `category` says whose fault it is."""

    category: Category = "platform"
    code: str = "engine_error"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(cls: type[EngineError], message: str, facts: dict[str, Any]) -> EngineError:
    return cls(message, **facts)


class SpecError(EngineError, ValueError):
    """A field of a spec is impossible. Facts: `field`, dotted from the spec's root."""

    category = "user"
    code = "invalid_spec"

    @property
    def field(self) -> str:
        return str(self.facts.get("field", ""))


class DataError(EngineError):
    """A row of a dataset cannot be used. Facts: `line` (1-based) and `path` within the row."""

    category = "user"
    code = "invalid_dataset"


class BaseModelError(EngineError):
    """The base model's files are missing, torn, or of a kind the engine does not load."""

    code = "base_model_unusable"


class AdapterError(EngineError):
    """Adapter files do not fit together, or not to the base model."""

    category = "user"
    code = "adapter_unusable"


class CheckpointError(EngineError):
    """A checkpoint is torn, altered, or belongs to another spec."""

    code = "checkpoint_unusable"


class WouldNotFit(EngineError):
    """The plan needs more memory than there is. Facts: `needed_bytes`, `available_bytes`."""

    category = "capacity"
    code = "would_not_fit"


class OutOfMemory(EngineError):
    """The device ran out of memory in spite of the plan."""

    category = "capacity"
    code = "out_of_memory"


class Diverged(EngineError):
    """Loss or gradients stopped being finite. Facts: `step`."""

    category = "user"
    code = "diverged"
