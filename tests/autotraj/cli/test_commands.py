"""Every command says what is wrong in a sentence, with exit code 2, before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT

from autotraj.__main__ import main

pytestmark = pytest.mark.slow

TINY = "examples/tiny/run.toml"
TYPO = ["--config", TINY, "grpo.num_stepz=3"]
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed"}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints on its way out; it must be the user's to mend, and no traceback."""
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
    return printed


def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """One process makes a mistake with every command; a single import of torch by any of them shows."""
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[[benchmark]]\n")
    mistakes = [
        *[[command, *TYPO] for command in ("run", "synthesize", "sft", "reward-model", "grpo", "evaluate")],
        ["run", "--dry-run", *TYPO],
        *[[command, "--config", TINY, "model=nowhere"] for command in ("run", "sft", "grpo", "evaluate")],
        ["sft", "--config", TINY, f'run_dir="{tmp_path / "no_synthesis"}"'],
        ["reward-model", "--config", TINY, f'run_dir="{tmp_path / "no_synthesis"}"'],
        ["grpo", "--resume", str(tmp_path)],
        ["evaluate", "--config", TINY, "--benchmarks", str(wrong)],
        ["compare", str(tmp_path / "nothing")],
        ["report", str(tmp_path / "nothing")],
        ["status", str(tmp_path / "nothing")],
        ["search-index", str(tmp_path / "nothing"), str(tmp_path / "index")],
        *[["sandbox", action, "sandbox.addres=1"] for action in ("serve", "build", "attack", "stats", "bench")],
        ["submit", "--", "run", *TYPO],
    ]
    code = (
        "import sys\nfrom autotraj.__main__ import main\n"
        f"for words in {mistakes!r}:\n"
        "    code = main(words)\n"
        "    allowed = {'ray'} if words[0] == 'submit' else set()\n"  # it talks to a cluster's job server with Ray
        f"    heavy = ({HEAVY!r} & set(sys.modules)) - allowed\n"
        "    if code != 2 or heavy: sys.exit(f'{words}: exit code {code}, imported {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(mistakes)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "file", "content", "message"),
    [
        ("sft", "sft.jsonl", "", "sft.jsonl is empty"),
        ("sft", "sft.jsonl", "no json\n", "sft.jsonl, line 1: not valid JSON"),
        ("sft", "sft.jsonl", '{"text": "a"}\n', "sft.jsonl, line 1: no field 'messages'"),
        ("reward-model", "preferences.jsonl", '{"prompt": []}\n', "preferences.jsonl, line 1: no field 'chosen'"),
    ],
)
def test_a_stage_reads_its_input_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, file: str, content: str, message: str
) -> None:
    (tmp_path / "synthesis").mkdir()
    (tmp_path / "synthesis" / file).write_text(content)
    assert message in fails(capsys, command, "--config", TINY, f'run_dir="{tmp_path}"')


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"grpo": 3}'])
def test_a_damaged_list_of_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "stages.json").write_text(content)
    printed = fails(capsys, "sft", "--config", TINY, f'run_dir="{tmp_path}"')
    assert f"{tmp_path / 'stages.json'}: it can't be read" in printed


def test_a_stage_that_is_done_says_so_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stages.json").write_text(json.dumps({"sft": {}}))
    assert f"sft is done in {tmp_path}" in fails(capsys, "sft", "--config", TINY, f'run_dir="{tmp_path}"')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b'{"stages": []}', "summary.json is no result: run: Field required"),
        ("a.json", b"", "a.json is no result: Invalid JSON"),
        ("a.json", b"[]", "a.json is no result: "),
        ("a.json", b"\xff\xfe", "a.json is no result: 'utf-8' codec can't decode"),
        ("config.toml", b"", "is the folder of a run, not of results"),
    ],
)
def test_compare_on_what_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / "status.json").write_text("{}") if name == "config.toml" else None
    (tmp_path / name).write_bytes(content)
    printed = fails(capsys, "compare", str(tmp_path))
    assert message in printed
    assert printed.count("\n") == 1
    assert "evaluate --benchmarks FILE --out FOLDER` writes" in printed


def test_a_configuration_is_no_suite_of_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    printed = fails(capsys, "evaluate", "--config", TINY, "--benchmarks", TINY)
    assert printed == (
        f"error: --benchmarks {TINY}: no suite of benchmarks, as it has no [[benchmarks]] table; it looks like a run's "
        "configuration, which is for --config. An example is examples/benchmarks.toml\n"
    )


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"time": 1}'])
def test_a_damaged_status(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert f"{tmp_path / 'status.json'} can't be read as the status of a run" in fails(capsys, "status", str(tmp_path))
