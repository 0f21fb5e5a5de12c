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
        problems = "\n".join(f"- {sentence}" for sentence in _sentences(request) or [NO_FLAW])
    parts = {
        "question": request.task.question,
        "trajectory": markup.shortened(markup.quote(request.trajectory.text), config.max_trajectory_chars),
        "problems": markup.quote(problems),
    }
    template = config.right_prompt if request.correct else config.wrong_prompt
    return _PLACE.sub(lambda place: parts[place[1]], template)  # in one pass, so that inserted text is never filled in


def _sentences(request: RepairRequest) -> list[str]:
    """The problems in sentences with their figures. A note without a sentence stays as it is."""
    wrong = ["Its final answer is wrong."] if request.wrong_answer else []
    notes = [_NOTES.get(note, note) for note in request.notes]
    return [*wrong, *notes, *(_low(name, request.quality) for name in request.low_dimensions)]


def _low(dimension: str, found: Quality) -> str:
    wanted = f"; {found.ideal_num_words} are enough" if found.num_words > found.ideal_num_words > 0 else ""
    sentence = _LOW.get(dimension, f"low {dimension}")
    return sentence.format(lack=1 - found.dimensions[dimension], num_words=found.num_words, wanted=wanted)


_LOW: dict[str, str] = {
    "confidence": f"It sounds unsure: a thought holds a word such as {', '.join(DOUBTS)}.",
    "length": "Its length is off: it has {num_words} words{wanted}.",
    "repetition": "It repeats itself: {lack:.0%} of its runs of three words occur more than once.",
    "tool_success": "{lack:.0%} of its tool calls failed.",
    "grounding": "{lack:.0%} of its final answer stands neither in a tool result nor in the question.",
}
"""Dimension of quality → the sentence about a low one."""

_NOTES: dict[str, str] = {
    "unpaired_tag": "A tag is never closed, or a closing tag closes nothing.",
    "nested_tag": "A tag opens inside another.",
    "no_think": "It has no <think>.",
    "no_answer": "It never closes an <answer>.",
    "tool_without_result": "A tool call is not followed by its result.",
    "result_without_tool": "A <result> follows no tool call: only the environment writes results.",
    "no_boxed_answer": "Its <answer> has no \\boxed{} with the final answer.",
    "malformed": "It ended in markup that can't be continued.",
}
