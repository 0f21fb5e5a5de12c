"""All attacks of code, in the order in which they are run."""

from tool_sandbox.attacks.attack import Attack
from tool_sandbox.attacks.on_files import FILES
from tool_sandbox.attacks.on_privileges import ESCALATION
from tool_sandbox.attacks.on_processes import PROCESSES, RESOURCES
from tool_sandbox.attacks.on_shares import SHARES

ATTACKS: tuple[Attack, ...] = (*ESCALATION, *PROCESSES, *FILES, *RESOURCES, *SHARES)
