"""Both system call filters, the containers' and the gateway's: the kernel would refuse one that isn't well formed."""

from collections.abc import Callable

import pytest

from tool_sandbox import privileges
from tool_sandbox.image import syscalls

both = pytest.mark.parametrize("assemble", [syscalls.assemble, privileges.assemble], ids=["containers", "gateway"])


@both
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_jump_ends_inside_and_the_last_instruction_returns(assemble: Callable[[str], bytes], machine: str) -> None:
    program = assemble(machine)
    instructions = [program[i : i + 8] for i in range(0, len(program), 8)]
    assert len(program) % 8 == 0
    for place, (code, _, if_true, if_false, *_) in enumerate(instructions):
        if code & 0x07 == 0x05:
            assert place + 1 + max(if_true, if_false) < len(instructions)
    assert instructions[-1][0] == syscalls.RETURN


@both
def test_a_machine_without_a_table_is_told(assemble: Callable[[str], bytes]) -> None:
    with pytest.raises(OSError, match="no system call table for riscv64; there is one for x86_64 and aarch64"):
        assemble("riscv64")
