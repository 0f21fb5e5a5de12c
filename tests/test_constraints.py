"""Each extra installs with the versions that its constraints file pins, on every Python that we support.

Only metadata is read, from the package registry that `uv` is set up with.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH = "2.13.0"
TORCH_NEEDS = ["filelock", "fsspec", "jinja2", "networkx", "setuptools<82", "sympy>=1.13.3", "typing-extensions>=4.10"]
UNREACHABLE = ("failed to fetch", "error sending request", "dns error", "timed out")


@pytest.fixture(scope="module")
def find_links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PIP_FIND_LINKS names it, with torch's CPU build, which is not on PyPI. Only its metadata is asked for."""
    folder = tmp_path_factory.mktemp("wheels")
    info = f"torch-{TORCH}+cpu.dist-info"
    needs = "".join(f"Requires-Dist: {name}\n" for name in TORCH_NEEDS)
    with zipfile.ZipFile(folder / f"torch-{TORCH}+cpu-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}+cpu\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def pins(text: str) -> set[str]:
    return {line for line in text.splitlines() if line and not line.startswith("#")}


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("extra", "torch"), [("cpu", f"{TORCH}+cpu"), ("cuda", TORCH)])
def test_an_extra_resolves_to_its_constraints(extra: str, torch: str, python: str, find_links: Path) -> None:
    """With the CPU build on offer, `cuda` still takes the other one. Nothing is left unpinned, and no pin is left over."""
    file = ROOT / f"constraints-{extra}.txt"
    words = f"uv pip compile --quiet --no-header --no-annotate --python-version {python}".split()
    words += f"--python-platform x86_64-manylinux_2_28 --extra {extra} --extra dev".split()
    words += ["--constraint", str(file), "--find-links", str(find_links), "pyproject.toml"]
    words[0] = str(Path(sys.executable).with_name("uv"))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if any(word in done.stderr.lower() for word in UNREACHABLE):
        pytest.skip("the package registry can't be reached")
    assert done.returncode == 0, done.stderr
    assert pins(done.stdout) == {*pins(file.read_text()), f"torch=={torch}"}


def test_the_constraints_name_no_registry() -> None:
    for extra in ("cpu", "cuda"):
        text = (ROOT / f"constraints-{extra}.txt").read_text()
        assert "://" not in text
        assert all("==" in line for line in pins(text))
