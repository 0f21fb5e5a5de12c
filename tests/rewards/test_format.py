"""The format check names what is wrong."""

import pytest

from rewards import format


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("<think>a</think><answer>\\boxed{1}</answer>", ()),
        ("<think>a</think><code>1</code><result>1</result><answer>\\boxed{1}</answer>", ()),
        ("<think>a</think><code>1</code><answer>\\boxed{1}</answer>", ("tool_without_result",)),
        ("\\boxed{1}", ("no_think", "no_answer")),
    ],
)
def test_check(text, problems):
    assert format.check(text) == format.FormatResult(ok=not problems, problems=problems)
