import pickle

import pytest

from lora_engine import errors
from lora_engine.errors import EngineError

EVERY = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EngineError)]


@pytest.mark.parametrize("kind", EVERY)
def test_errors_survive_a_process_boundary(kind: type[EngineError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what happened", field="lora.rank", line=3)))  # noqa: S301
    assert type(error) is kind
    assert (error.message, str(error)) == ("what happened", "what happened")
    assert error.facts == {"field": "lora.rank", "line": 3}


def test_codes_are_unique_and_documented_with_their_category() -> None:
    assert len({kind.code for kind in EVERY}) == len(EVERY) == 9
    for kind in EVERY[1:]:
        (line,) = (line for line in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in line)
        assert kind.category in line


def test_a_spec_error_is_a_value_error_with_a_field() -> None:
    assert isinstance(errors.SpecError("no"), ValueError)
    assert errors.SpecError("no", field="rank").field == "rank"
    assert errors.SpecError("no").field == ""
