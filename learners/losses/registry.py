"""All policy objectives by the name in `loss.algorithm`. A further one is a file like `grpo.py` and its line here."""

from learners.losses.cispo import CISPO
from learners.losses.dapo import DAPO
from learners.losses.dr_grpo import DR_GRPO
from learners.losses.grpo import GRPO
from learners.losses.gspo import GSPO
from learners.losses.objective import PolicyObjective

LOSSES: dict[str, PolicyObjective] = {objective.name: objective for objective in (GRPO, DR_GRPO, DAPO, GSPO, CISPO)}
