"""The shape of the house: who may import whom, and that a long file says why it is one."""

import ast
import graphlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONG_FILE_LINES = 600

# Room → rooms of ours that it may import, besides itself; a room inside another is named by itself. Or single modules.
BOTTOM = {"storage", "trajectory"}
ALLOWED = {
    "storage": set(),
    "trajectory": {"storage"},
    "tasks": {"trajectory", "storage"},
    "report": {"trajectory", "storage"},
    "rewards": {"trajectory"},
    "models": {"trajectory"},
    "learners": {*BOTTOM, "models"},
    "cluster": {"trajectory"},
    "tool_sandbox": {"trajectory", "tool_sandbox.search", "tool_sandbox.image"},
    "tool_sandbox.search": {"trajectory", "tool_sandbox.config", "tool_sandbox.errors"},
    "tool_sandbox.attacks": {"trajectory", "tool_sandbox", "tool_sandbox.image.syscalls"},
    "tool_sandbox.image": set(),  # it runs in the container, without the rest
    # `config` for the certificates' paths, `failover` is the client of several gateways.
    "actors": {
        *BOTTOM,
        "rewards",
        "models",
        "actors.engine",
        "actors.repair",
        *(f"tool_sandbox.{m}" for m in ("client", "config", "failover", "wire")),
    },
    "actors.engine": {*BOTTOM, "models", "actors.config"},
    "actors.repair": {*BOTTOM, "rewards", "actors", "actors.engine"},
    "actors.reward_model": {*BOTTOM, "models", "actors.config"},
}
GROUND = set(ALLOWED)
# The rooms and files of `autotraj`: each may import the ground and what stands before it in this list.
ROOF = (
    "autotraj.errors",
    "autotraj.memory",
    "autotraj.interrupt",
    "autotraj.config",
    "autotraj.status",
    "autotraj.run_folder",
    "autotraj.planning",
    "autotraj.preferences",
    "autotraj.runners",
    "autotraj.gateways",
    "autotraj.sampling",
    "autotraj.training",
    "autotraj.loop",
    "autotraj.evaluation",
    "autotraj.launch",
    "autotraj.stages",
    "autotraj.cli",
    "autotraj.__main__",
)
ALLOWED |= {room: {*GROUND, *ROOF[:number]} for number, room in enumerate(ROOF)}
ROOMS = {room.split(".")[0] for room in ALLOWED}
# Room (or module) → third-party packages it must never import.
FORBIDDEN = {
    "storage": {"ray", "torch", "vllm", "grpc", "deepspeed", "docker"},
    "trajectory": {"ray", "torch", "vllm", "grpc", "deepspeed", "docker"},
    "tasks": {"ray", "torch", "vllm", "grpc", "deepspeed", "docker"},
    "report": {"ray", "torch", "vllm", "grpc", "deepspeed", "docker"},
    "rewards": {"ray", "torch", "vllm", "grpc", "deepspeed", "docker"},
    "tool_sandbox": {"ray", "torch", "vllm", "deepspeed"},
    "models": {"ray", "vllm", "deepspeed"},
    "learners.losses": {"ray", "deepspeed", "vllm", "transformers"},
    "learners.advantages": {"ray", "deepspeed", "vllm", "transformers"},
    "learners.batching": {"ray", "deepspeed", "vllm", "transformers"},
}


def source_files() -> list[Path]:
    return [p for room in sorted(ROOMS) for p in sorted((ROOT / room).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the room's name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def covered(name: str, prefixes: set[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def room_of(module: str) -> str:
    """The innermost room that a module lies in."""
    return max((room for room in ALLOWED if covered(module, {room})), key=len, default=module)


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_a_room_imports_only_what_it_may_know(path: Path) -> None:
    module = module_name(path)
    if module == "autotraj":
        return
    room = room_of(module)
    ours = {n for n in imports(path) if n.split(".")[0] in ROOMS and room_of(n) != room}
    single_modules = ALLOWED[room] - ALLOWED.keys()
    assert {n for n in ours if room_of(n) not in ALLOWED[room] and not covered(n, single_modules)} == set()


def import_graph() -> dict[str, set[str]]:
    """Module of ours → modules of ours that it imports, wherever the statement stands, also for types only."""
    modules = {module_name(p): p for p in source_files()}
    return {
        module: {
            target
            for name in imports(path)
            for target in [name if name in modules else name.rpartition(".")[0]]
            if target in modules and target != module
        }
        for module, path in modules.items()
    }


def test_no_two_files_import_each_other() -> None:
    """Not by a detour, either: TopologicalSorter names the files of a circle."""
    graphlib.TopologicalSorter(import_graph()).prepare()


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_a_room_stays_free_of_packages_it_must_not_need(path: Path) -> None:
    module = module_name(path)
    for prefix, forbidden in FORBIDDEN.items():
        if covered(module, {prefix}):
            assert {n for n in imports(path) if n.split(".")[0] in forbidden} == set()


def test_a_long_file_opens_with_why_it_is_one() -> None:
    """One idea a file. Where one idea takes over 600 lines, the docstring says so, with the words "one file because"."""
    files = [p for d in [*ROOMS, "tests", "benchmarks", "examples"] for p in (ROOT / d).rglob("*.py")]
    long = [p for p in files if len(p.read_text().splitlines()) > LONG_FILE_LINES]
    unexplained = [
        p for p in long if "one file because" not in (ast.get_docstring(ast.parse(p.read_text())) or "").lower()
    ]
    assert [str(p.relative_to(ROOT)) for p in unexplained] == []


def test_no_catch_all_modules() -> None:
    assert [p for p in source_files() if p.stem in {"util", "utils", "helpers", "misc", "common"}] == []


# Private names of libraries that we read because there is no other way.
THEIR_PRIVATE_NAMES = {
    "os._exit",
    "argparse._SubParsersAction",  # a type
    "ray._private",
    "ray._private.worker._global_node",
    "packaging._dir_travel",  # Ray's rules of which files a job ships
    "packaging._get_excludes",
    "internal_kv._internal_kv_put",
    "internal_kv._internal_kv_get",
    "internal_kv._internal_kv_list",
    "internal_kv._internal_kv_del",
    "group._worker_manager",  # RLlib's, whose own wrappers don't say which request failed
    "layer._disable_adapters",  # PEFT
    "engine._config",  # DeepSpeed
    "lm._supports_sdpa",  # transformers
    "lm.config._attn_implementation",
    "trainer._tokenize_prompts",  # TRL, in a benchmark
    "trainer._generate_single_turn",
    # In the container, where the user's code runs as in an interpreter of its own:
    "multiprocessing.context._concrete_contexts",
    "builtins._",
    "threading._shutdown",
    "atexit._run_exitfuncs",
}


def private_reads(tree: ast.AST) -> set[str]:
    """`x._name` if the file itself neither defines `_name` nor has it in `self`, and our `_name`s that it imports."""
    own: set[str] = set()
    reads: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                own.add(name)
            case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                reads[ast.unparse(node)] = name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                own.add(name)
            case ast.ImportFrom(module=module, names=names) if str(module).split(".")[0] in ROOMS:
                reads |= {f"{module}.{a.name}": a.name for a in names if a.name.startswith("_")}
    return {read for read, name in reads.items() if name not in own}


def test_no_file_reads_the_private_names_of_another() -> None:
    files = [*source_files(), *(p for folder in ("benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))]
    found = {read: str(p.relative_to(ROOT)) for p in files for read in private_reads(ast.parse(p.read_text()))}
    assert {read: where for read, where in found.items() if read not in THEIR_PRIVATE_NAMES} == {}
    assert THEIR_PRIVATE_NAMES - found.keys() == set()  # an exception that isn't needed any more is deleted


def test_tests_are_not_packages() -> None:
    """`tests/actors/__init__.py` would shadow the room `actors`."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_tests_import_no_conftest_and_no_other_test() -> None:
    """`conftest` is one name for many files: which one an import gets would depend on the folders that are run together."""
    files = (ROOT / "tests").rglob("*.py")
    found = [(str(p.relative_to(ROOT)), n) for p in files for n in imports(p) if re.match(r"(conftest|test_\w+)\b", n)]
    assert found == []


def test_help_needs_no_heavy_package() -> None:
    """`--help` is answered before anything heavy is imported, so it stays instant."""
    code = (
        "import sys, runpy; sys.argv = ['autotraj', '--help']\n"
        "try: runpy.run_module('autotraj', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'grpc'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "grpo" in done.stdout
    assert time.monotonic() - start < 20  # a hang, not a speed, is what this catches


# --- what the documents name -----------------------------------------------------------------------------------------

DOCUMENTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "DECISIONS")), *(ROOT / "docs").glob("*.md")]
PATH = re.compile(r"(?<![\w/.~:-])(?:[\w.-]+/)+[\w.-]*")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_a_document_names_is_there(document: Path) -> None:
    """Relative links; files and folders by their path from the root; modules that are run; the tests that show a promise."""
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    top = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "build"}
    paths = {found.rstrip(".") for found in PATH.findall(text)}
    named = {path for path in paths if path.split("/")[0] in top or path.endswith(".py")}
    missing += [path for path in named if not any((start / path).exists() for start in (ROOT, document.parent))]
    modules = {name.rstrip(".").replace(".", "/") for name in re.findall(r"-m ((?:benchmarks|examples)\.[\w.]+)", text)}
    missing += [
        name for name in modules if not ((ROOT / f"{name}.py").exists() or (ROOT / name / "__main__.py").exists())
    ]
    tests = set(re.findall(r"(?<![\w/])test_\w+", text))
    missing += [name for name in tests if not any((ROOT / "tests").rglob(f"{name}.py"))]
    assert sorted(missing) == []


def test_the_functions_that_architecture_names_are_there() -> None:
    """In the table of a prompt's way: a file, and what it visits there."""
    rows = re.findall(
        r"^\| `([\w/]+\.py)` \| ((?:`[\w.]+` ?)+)\|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    missing = []
    for path, names in rows:
        defined = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")}
        missing += [f"{path}: {name}" for name in re.findall(r"[\w.]+", names) if not set(name.split(".")) <= defined]
    assert missing == []


def test_architecture_shows_the_rooms_as_they_are() -> None:
    """Its first table has every ground room with what it may import, its second one the roof in its order."""
    text = (ROOT / "docs/architecture.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", text, re.MULTILINE))
    ground = {room for room in ALLOWED if "." not in room}
    assert shown.keys() == {*ground, "autotraj"}
    for room in ground:
        assert set(re.findall(r"`(\w+)`", shown[room])) == {other for other in ALLOWED[room] if "." not in other}
    files = ("errors", "memory", "interrupt", "__main__")  # of the roof, that need no row
    roof = [name for room in ROOF if (name := room.removeprefix("autotraj.")) not in files]
    assert re.findall(r"^\| `autotraj/(\w+)(?:/|\.py)` \| [^`|]* \|$", text, re.MULTILINE) == roof
