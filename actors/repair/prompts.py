"""The prompts of a repair: the user's messages that `[repair]` uses unless it has its own (arXiv 2601.23032, stage 1).

`{question}`, `{trajectory}` and `{problems}` are filled in by `render_repair_prompt`.
"""

_EARLIER = """Question:
{question}

The earlier attempt, with what its tools returned:
{trajectory}

What is wrong with it:
{problems}

Solve the question anew, from the first step, with the same tags. Keep what is right. Run the tools yourself and rely on what
they return. Be brief, clear and definite: say nothing twice, take no detour, and instead of doubting run a tool. Don't
mention the earlier attempt."""

RIGHT_PROMPT = f"""An earlier attempt at this question has the right answer by a poor path: it may be redundant, unclear or
unsure.

{_EARLIER}"""

WRONG_PROMPT = f"""An earlier attempt at this question failed: it may have misread the question, reasoned wrongly, calculated
wrongly, or used a tool wrongly. Find the mistake.

{_EARLIER}"""
