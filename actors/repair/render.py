"""Writes the message to a repairer: the question, the bad trajectory with its tool results, and its problems in words."""

from __future__ import annotations

import re

from actors.config import RepairConfig
from actors.repair.types import RepairRequest
from rewards.dimensions import DOUBTS
from rewards.quality import Quality
from trajectory import markup

NO_FLAW = "Nothing stands out, but another attempt was better."
"""The problem that is named for a good trajectory which isn't the question's best."""

_PLACE = re.compile(r"\{(question|trajectory|problems)\}")


def render_repair_prompt(request: RepairRequest, config: RepairConfig) -> str:
    """The user's message. The bad trajectory in it can't end the message or open another one. It has no gold answers."""
    if config.problems_as == "names":
        problems = ", ".join(request.problems)
    else:
        problems = "\n".join(f"- {describe(name, request.quality)}" for name in request.problems or (NO_FLAW,))
    parts = {
        "question": request.task.question,
        "trajectory": markup.shortened(markup.quote(request.trajectory.text), config.max_trajectory_chars),
        "problems": markup.quote(problems),
    }
    template = config.right_prompt if request.correct else config.wrong_prompt
    return _PLACE.sub(lambda place: parts[place[1]], template)  # in one pass, so that inserted text is never filled in


def describe(problem: str, found: Quality) -> str:
    """The name of a problem as a sentence with its figures. An unknown name stays as it is."""
    if problem == "low length":
        wanted = f"; {found.ideal_num_words} are enough" if found.num_words > found.ideal_num_words > 0 else ""
        return f"Its length is off: it has {found.num_words} words{wanted}."
    if problem == "low repetition":
        share = 1 - found.dimensions.get("repetition", 1.0)
        return f"It repeats itself: {share:.0%} of its runs of three words occur more than once."
    if problem == "low tool_success":
        share = 1 - found.dimensions.get("tool_success", 1.0)
        return f"{share:.0%} of its tool calls failed."
    if problem == "low grounding":
        share = 1 - found.dimensions.get("grounding", 1.0)
        return f"{share:.0%} of its final answer stands neither in a tool result nor in the question."
    return _SENTENCES.get(problem, problem)


_SENTENCES: dict[str, str] = {
    "wrong answer": "Its final answer is wrong.",
    "low confidence": f"It sounds unsure: a thought holds a word such as {', '.join(DOUBTS)}.",
    "unpaired_tag": "A tag is never closed, or a closing tag closes nothing.",
    "nested_tag": "A tag opens inside another.",
    "no_think": "It has no <think>.",
    "no_answer": "It never closes an <answer>.",
    "tool_without_result": "A tool call is not followed by its result.",
    "result_without_tool": "A <result> follows no tool call: only the environment writes results.",
    "no_boxed_answer": "Its <answer> has no \\boxed{} with the final answer.",
    "malformed": "It ended in markup that can't be continued.",
}
