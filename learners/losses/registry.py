"""All policy objectives by their name in `loss.algorithm`. To add one, write a file like `grpo.py` and add a line here."""

from learners.losses.cispo import CISPO
from learners.losses.dapo import DAPO
from learners.losses.dr_grpo import DR_GRPO
from learners.losses.grpo import GRPO
from learners.losses.gspo import GSPO
from learners.losses.objective import PolicyObjective

LOSSES: dict[str, PolicyObjective] = {objective.name: objective for objective in (GRPO, DR_GRPO, DAPO, GSPO, CISPO)}
