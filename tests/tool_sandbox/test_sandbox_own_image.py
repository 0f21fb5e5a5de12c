"""A user's own image: whether the runner works in it is found out before a call is, and told."""

import subprocess
import uuid
from collections.abc import Iterator

import pytest

from tool_sandbox.build import image_tag
from tool_sandbox.errors import ImageError
from tool_sandbox.image import syscalls
from tool_sandbox.image.runner import PROTOCOL
from tool_sandbox.local import local_sandbox

ONE = {"num_containers": 1, "num_spares": 0, "slots_per_container": 1, "start_timeout_s": 120}


def built(dockerfile: str) -> Iterator[str]:
    name = f"autotraj-test-own:{uuid.uuid4().hex[:8]}"
    subprocess.run(
        ["docker", "build", "--quiet", "--tag", name, "-"], input=dockerfile.encode(), check=True, timeout=120
    )
    try:
        yield name
    finally:
        subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=False, timeout=60)


@pytest.fixture
def lacks_runner() -> Iterator[str]:
    yield from built(f'FROM {image_tag()}\nENTRYPOINT ["python3", "-m", "no_runner_here"]\n')


@pytest.fixture
def of_another_version() -> Iterator[str]:
    change = "import pathlib; p = pathlib.Path('/opt/runner/tool_sandbox/image/runner.py'); "
    change += f"p.write_text(p.read_text().replace('PROTOCOL = {PROTOCOL}', 'PROTOCOL = 1'))"
    yield from built(f'FROM {image_tag()}\nRUN python3 -c "{change}"\n')


@pytest.fixture
def with_more() -> Iterator[str]:
    yield from built(f"FROM {image_tag()}\nENV MORE=1\n")


@pytest.mark.docker
def test_an_image_without_a_runner_is_told_with_its_remedy(lacks_runner: str) -> None:
    with pytest.raises(ImageError, match=r"sandbox.image: .* has no working runner: .*no_runner_here.*FROM autotraj"):  # noqa: SIM117
        with local_sandbox(image=lacks_runner, **ONE):
            pass


@pytest.mark.docker
def test_an_image_with_another_version_of_the_runner_is_told(of_another_version: str) -> None:
    with pytest.raises(ImageError, match="its runner speaks version 1 of the protocol, this gateway 2"):  # noqa: SIM117
        with local_sandbox(image=of_another_version, **ONE):
            pass


@pytest.mark.docker
def test_an_image_made_from_ours_works(with_more: str) -> None:
    with local_sandbox(image=with_more, **ONE) as client:
        result = client.call("python", "import os; print('MORE' in os.environ)", timeout_s=20)
    assert (result.status, result.output) == ("ok", "False\n")  # code sees nothing of the container's environment


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_well_formed(machine: str) -> None:
    """Each jump ends inside the program, and the last instruction returns: the kernel would refuse it otherwise."""
    program = syscalls.assemble(machine)
    instructions = [program[i : i + 8] for i in range(0, len(program), 8)]
    assert len(program) % 8 == 0
    for place, (code, _, if_true, if_false, *_) in enumerate(instructions):
        if code & 0x07 == 0x05:
            assert place + 1 + max(if_true, if_false) < len(instructions)
    assert instructions[-1][0] == syscalls.RETURN


def test_a_machine_without_a_table_is_told() -> None:
    with pytest.raises(OSError, match="no system call table for riscv64; there is one for x86_64 and aarch64"):
        syscalls.assemble("riscv64")
