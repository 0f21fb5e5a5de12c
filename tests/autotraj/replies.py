"""Two replies to "What is 2 times 3?": a clean one, and one that hesitates."""

from trajectory.markup import render_result

CLEAN = (
    "<think>Plan: multiply.</think>\n<code>\nprint(2*3)\n</code>"
    + render_result("6\n", max_chars=100)
    + "<think>The code gives the answer.</think>\n<answer>\\boxed{6}</answer>"
)
POOR = CLEAN.replace("Plan: multiply.", "Maybe I multiply, or perhaps I add.")
