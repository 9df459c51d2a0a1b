"""The corpus of hostile input: 92 cases, each shown by a test that bears its number, or named here with the reason.

J bodies of JSON, H the level of HTTP, D datasets, S orders, A what is asked about jobs, M adapters, O OpenAI's face,
K callers. A test's number is in its name (`test_h6_…`) or begins the name of one of its parameters (`D10 bad row 7`).
"""

import importlib
import re
from pathlib import Path

import pytest
from _pytest.mark.structures import Mark, ParameterSet

from service.app import create_app
from service.settings import Settings

CORPUS = {"J": 20, "H": 10, "D": 23, "S": 10, "A": 7, "M": 8, "O": 8, "K": 6}
ROOT = Path(__file__).parents[3]
# Shown by tests of another part, which know nothing of the numbers.
ELSEWHERE = {
    "S4": "tests/lora_engine/test_plan.py::test_less_memory_costs_more_time_until_the_job_is_refused",
    "S8": "tests/service/test_quotas.py::test_s8_a_hundred_at_once_get_exactly_what_is_left",
    "S10": "tests/service/test_webhook_addresses.py::test_s10_urls_that_are_refused",
    "K6": "tests/service/test_webhook_delivery.py::test_k6_openais_client_verifies_a_message_and_no_altered_or_old_one",
    "A2": "tests/service/test_jobs.py::test_cancel_racing_publish_has_one_winner",
    "A3": "tests/service/api/test_event_stream.py::test_one_owner_has_so_many_streams_and_no_more",
    "M5": "tests/service/api/test_merges.py::test_a_merge_across_base_models_is_refused",
    "O8": "tests/lora_engine/test_chat_template.py::test_what_does_not_end_is_ended_and_the_next_one_renders",
    "D19": "tests/lora_engine/test_chat.py::test_d19_a_message_that_spells_control_tokens_is_text",
}
# Nothing takes such input yet; the day something does, `test_what_is_not_there_is_not_there` says so.
NO_FACE = {
    **dict.fromkeys(("O1", "O2", "O3", "O4", "O5", "O6", "O7"), "no OpenAI face"),
    "D6": "no uploads in parts",
    "M6": "no signed URLs: every byte comes through the API, to its owner",
    "K5": "no dashboard, no cookies, no sessions",
}


def shown() -> set[str]:
    """The numbers of this folder's tests."""
    found: set[str] = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for name, function in vars(module).items():
            if not name.startswith("test_"):
                continue
            if number := re.match(r"test_([jhdsamok]\d+)_", name):
                found.add(number[1].upper())
            for mark in getattr(function, "pytestmark", []):
                found |= numbers(mark)
    return found


def numbers(mark: Mark) -> set[str]:
    if mark.name != "parametrize":
        return set()
    values = [value.id if isinstance(value, ParameterSet) else value for value in mark.args[1]]
    names = mark.kwargs.get("ids") or values
    return {match[0] for name in names if (match := re.match(r"[JHDSAMOK]\d+(?= )", str(name)))}


def test_every_case_is_accounted_for() -> None:
    corpus = {f"{face}{number}" for face, count in CORPUS.items() for number in range(1, count + 1)}
    assert len(corpus) == 92
    here = shown()
    assert here | ELSEWHERE.keys() | NO_FACE.keys() == corpus
    assert not here & NO_FACE.keys()


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_is_shown_elsewhere_is_there(case: str) -> None:
    path, _, name = ELSEWHERE[case].partition("::")
    assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), ELSEWHERE[case]


def test_what_is_not_there_is_not_there(tmp_path: Path) -> None:
    """A face that appears has to take its cases out of `NO_FACE`."""
    document = create_app(Settings(data_dir=tmp_path)).openapi()
    assert not [path for path in document["paths"] if path.startswith(("/v1", "/chat", "/dashboard", "/uploads"))]
    assert not [path for path, methods in document["paths"].items() if "patch" in methods and "/webhooks" not in path]
    parameters = [
        parameter["name"].lower()
        for methods in document["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
    ]
    assert not {"signature", "x-amz-signature", "expires", "token", "cookie"} & set(parameters)
