"""Builds the container image where it is missing, on a registry's Python or else on Debian packages.

The image's tag is a hash of `image/`, so an image of other sources is never used. Packages are wheels that are unpacked on
this machine: `docker build` then needs no network, which many nodes don't have.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import ContainerEngineError, ImageError

SOURCES = Path(__file__).resolve().parent / "image"
REPOSITORY = "autotraj-sandbox"
REGISTRY_BASE = "python:3.11-slim"
DEBIAN_BASE = "autotraj-sandbox-base:debian"
DEBIAN_PACKAGES = ("python3", "dash", "coreutils", "base-files", "libstdc++6")
"""What a container needs: Python with its standard library, a shell and basic commands, and the C++ library for wheels."""

PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
COMMAND_TIMEOUT_S = 600.0
PULL_TIMEOUT_S = 120.0


def image_tag() -> str:
    """The tag `autotraj-sandbox:HASH`, where HASH is that of the sources in `image/`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{REPOSITORY}:{digest.hexdigest()[:12]}"


def resolve_image(config: SandboxConfig) -> str:
    """The name of the image to use: the one that `config` names, or else the one built from `image/`."""
    return config.image or image_tag()


def check_engine() -> None:
    """ContainerEngineError, with the remedy, unless a Docker engine answers."""
    try:
        done = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, timeout=20
        )
    except FileNotFoundError:
        raise ContainerEngineError(
            "sandbox: the `docker` command is missing; `make setup` installs it, as root on Debian"
        ) from None
    except subprocess.TimeoutExpired:
        raise ContainerEngineError("sandbox: the Docker engine did not answer within 20 s; restart dockerd") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ContainerEngineError(
            f"sandbox: no Docker engine is reachable ({reason}); start dockerd, or run `make setup`"
        )


def check_runtime(config: SandboxConfig) -> None:
    """ContainerEngineError unless the engine has the runtime that `config` names, if it names one."""
    if not config.runtime:
        return
    known = json.loads(_run(["docker", "info", "--format", "{{json .Runtimes}}"], timeout_s=20.0).stdout)
    if config.runtime not in known:
        raise ContainerEngineError(
            f"sandbox.runtime: the Docker engine has no runtime {config.runtime!r}, only {', '.join(sorted(known))}; "
            "add it to its daemon.json and reload the engine, or leave sandbox.runtime empty"
        )


def user_ids() -> range:
    """The user ids that calls in containers get; ContainerEngineError if the engine can't limit what containers use.

    The ids are far from those of the host's users. If the engine uses a user namespace (rootless, `userns-remap`), no id in
    a container is a user of the host, and usually 65,536 ids are mapped."""
    info = json.loads(_run(["docker", "info", "--format", "{{json .}}"], timeout_s=20.0).stdout)
    if info.get("CgroupDriver") == "none":
        raise ContainerEngineError(
            "sandbox: the Docker engine has no control groups (`docker info`: Cgroup Driver: none), so a container's memory "
            "and processes would have no limit; a rootless engine needs a machine with cgroup v2 and systemd"
        )
    options = info.get("SecurityOptions") or []
    in_namespace = any(option.startswith(("name=rootless", "name=userns")) for option in options)
    return range(2_000, 65_000) if in_namespace else range(1_000_000, 35_000_000)


def image_exists(image: str) -> bool:
    return _run(["docker", "image", "inspect", image], check=False).returncode == 0


def check_ready(config: SandboxConfig) -> None:
    """ContainerEngineError or ImageError, with the remedy, unless the gateway could start its containers."""
    check_engine()
    check_runtime(config)
    image = resolve_image(config)
    if not image_exists(image):
        remedy = f"docker pull {image}" if config.image else "`python -m autotraj sandbox build`, or `make setup`"
        raise ImageError(f"sandbox: the container image {image} is not there; get it with {remedy}")


def ensure_image(config: SandboxConfig) -> str:
    """Build the image unless it is there; returns its name. Errors: ContainerEngineError, ImageError."""
    check_engine()
    image = resolve_image(config)
    if image_exists(image):
        return image
    if config.image:
        raise ImageError(
            f"sandbox.image: {image} is not there and is not ours to build; get it with docker pull {image}"
        )
    base = _base_image()
    with tempfile.TemporaryDirectory(prefix="autotraj-image-") as folder:
        context = Path(folder)
        shutil.copytree(SOURCES, context, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        print(f"==> sandbox image {image} from {base}: packages", flush=True)
        _install_packages(context, *_python_of(base))
        print(f"==> sandbox image {image}: docker build", flush=True)
        _run(["docker", "build", "--quiet", "--build-arg", f"BASE_IMAGE={base}", "--tag", image, folder])
    return image


def _base_image() -> str:
    """The registry's Python image if it is here or can be pulled, else one made from Debian packages. Prints which."""
    if image_exists(REGISTRY_BASE):
        return REGISTRY_BASE
    if image_exists(DEBIAN_BASE):
        return DEBIAN_BASE
    try:
        _run(["docker", "pull", "--quiet", REGISTRY_BASE], timeout_s=PULL_TIMEOUT_S)
        return REGISTRY_BASE
    except ImageError as error:
        print(f"==> {REGISTRY_BASE} can't be pulled ({str(error).splitlines()[-1][:120]}): a base from Debian packages")
    if shutil.which("apt-get") is None:
        raise ImageError(
            f"sandbox: {REGISTRY_BASE} can't be pulled and this is no Debian; docker load an image of it here"
        )
    _make_debian_base()
    return DEBIAN_BASE


def _make_debian_base() -> None:
    """Imports the unpacked `DEBIAN_PACKAGES` and all they depend on as an image. None of them is run or configured."""
    with tempfile.TemporaryDirectory(prefix="autotraj-base-") as folder:
        packages, root = Path(folder, "packages"), Path(folder, "root")
        packages.mkdir()
        packages.chmod(0o777)  # apt downloads as another user
        names = _closure(DEBIAN_PACKAGES)
        _run(["apt-get", "download", "--quiet", *names], cwd=packages)
        for name in ("bin", "sbin", "lib", "lib64"):  # the merged /usr that debootstrap would make
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in sorted(packages.glob("*.deb")):
            unpack = 'dpkg-deb --fsys-tarfile "$1" | tar --extract --keep-directory-symlink --directory "$2"'
            _run(["bash", "-o", "pipefail", "-c", unpack, "bash", str(package), str(root)])
        shutil.rmtree(root / "usr/share/doc", ignore_errors=True)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
        (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        (root / "tmp").mkdir(exist_ok=True)
        load = 'tar --create --directory "$1" . | docker import --change "ENV LANG=C.UTF-8" - "$2"'
        _run(["bash", "-o", "pipefail", "-c", load, "bash", str(root), DEBIAN_BASE])


def _closure(names: Sequence[str]) -> list[str]:
    """All packages that `names` need, including `names`, without virtual packages."""
    quiet = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    lines = _run(["apt-cache", "depends", "--recurse", *quiet, *names]).stdout.splitlines()
    found = sorted({line.strip() for line in lines if line and not line[0].isspace() and not line.startswith("<")})
    if not set(names) <= set(found):
        raise ImageError("sandbox: apt does not know the packages of the base image; run apt-get update")
    return found


def _python_of(base: str) -> tuple[str, str]:
    """Version and machine of the base image's Python, like 3.11 and x86_64. The engine may run on another machine."""
    code = "import platform as p; print(*p.python_version_tuple()[:2], sep='.', end=' '); print(p.machine())"
    version, machine = _run(["docker", "run", "--rm", "--network", "none", base, "python3", "-c", code]).stdout.split()
    return version, machine


def _install_packages(context: Path, python_version: str, machine: str) -> None:
    """Unpack the wheels of requirements.txt, for the container's Python, into `site-packages`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(context / "site-packages"), "--only-binary=:all:", "--no-deps", "--no-compile"]
    command += [argument for platform in PLATFORMS for argument in ("--platform", f"{platform}_{machine}")]
    command += ["--python-version", python_version, "--implementation", "cp"]
    _run([*command, "--requirement", str(SOURCES / "requirements.txt")])
    # Tests are a seventh of the size, and nobody runs them in a container.
    for folder in sorted((context / "site-packages").glob("**/tests")):
        if folder.is_dir():  # it may have been removed together with its parent
            shutil.rmtree(folder)


def _run(
    command: Sequence[str], *, cwd: Path | None = None, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a command. ImageError, with the end of its output, if it fails or takes longer than `timeout_s`."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ImageError(f"sandbox image: {' '.join(command[:3])} took longer than {timeout_s:.0f} s") from None
    if check and done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ImageError(f"sandbox image: {' '.join(command[:3])} failed:\n{said}")
    return done
