"""A user's own image: whether the runner works in it is found out before a call is, and told."""

import subprocess
import uuid
from collections.abc import Iterator

import pytest

from tool_sandbox.build import image_tag
from tool_sandbox.errors import ImageError
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
    with pytest.raises(ImageError, match=f"its runner speaks version 1 of the protocol, this gateway {PROTOCOL}"):  # noqa: SIM117
        with local_sandbox(image=of_another_version, **ONE):
            pass


@pytest.mark.docker
def test_an_image_made_from_ours_works(with_more: str) -> None:
    with local_sandbox(image=with_more, **ONE) as client:
        result = client.call("python", "import os; print('MORE' in os.environ)", timeout_s=20)
    assert (result.status, result.output) == ("ok", "False\n")  # code sees nothing of the container's environment
