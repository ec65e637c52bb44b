"""What an error says is told in one line that has content, wherever it stood in the text."""

from __future__ import annotations

import traceback

import pytest
from pydantic import BaseModel, model_validator
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from deltal.errors import ModelError, one_line

LINK = "first what is wrong\nthen more\n    For further information visit https://errors.example"


class Engine(BaseModel):
    length: int
    heads: int = 2

    @model_validator(mode="after")
    def _fits(self) -> Engine:
        if self.length > 9:
            raise ValueError(f"length {self.length} is greater than 9")
        return self


def raised(error: Exception) -> tuple[Exception, str]:
    """The error and its traceback, as a Ray worker would send them."""
    try:
        raise error
    except Exception as caught:
        return caught, "\x1b[36mray::Worker.run()\x1b[39m (pid=7)\n" + traceback.format_exc()


def of_a_task(error: Exception) -> RayTaskError:
    cause, text = raised(error)
    return RayTaskError("Worker.run", text, cause, proctitle="worker", pid=7, ip="127.0.0.1")


def test_a_long_error_is_told_by_its_first_line_with_content() -> None:
    assert one_line(ValueError(f"\n\n  {LINK}"), line=0) == "first what is wrong"
    assert one_line(ValueError("x" * 1000), line=0) == "x" * 300
    assert one_line(ValueError("a\n b")) == "a b"
    assert one_line(ValueError(" ")) == one_line(ValueError(""), line=0) == "ValueError"


def test_what_a_remote_call_raised_is_told_and_not_its_traceback() -> None:
    error = of_a_task(ValueError(LINK))
    assert one_line(error, line=0) == "first what is wrong"
    assert one_line(error.as_instanceof_cause(), line=0) == "first what is wrong"
    assert one_line(of_a_task(ModelError("no such model"))) == "no such model"
    # Ray hands over no cause when an actor could not be made, only text.
    assert one_line(ActorDiedError(error), line=0) == "ValueError: first what is wrong"


def test_a_traceback_inside_a_text_is_passed_over() -> None:
    text = f"CheckpointException ranks:dict_keys([0])\n{raised(KeyError('weights'))[1]}"
    assert one_line(RuntimeError(text), line=0) == "KeyError: 'weights'"


def test_of_a_lost_process_the_reason_is_told_which_stands_last() -> None:
    facts = "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tpid: 7\n"
    died = RayActorError(actor_id="a" * 32, error_msg=f"{facts}Its worker process has died: killed by SIGKILL")
    assert one_line(died, line=0) == "Its worker process has died: killed by SIGKILL"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"length": 70000}, "length 70000 is greater than 9"),
        ({"length": "x"}, "length: Input should be a valid integer"),
    ],
)
def test_of_a_pydantic_error_its_first_finding_is_told(given: dict[str, int | str], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        Engine.model_validate(given)
    assert one_line(caught.value, line=0).startswith(told)
    assert one_line(of_a_task(caught.value), line=0).startswith(told)
    assert "\n" not in one_line(caught.value)
