"""Loading a configuration: everything wrong is found here, with the key's name."""

import tomllib
import types
import typing
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotraj.config.benchmarks import BenchmarkSuite, load_suite
from autotraj.config.run import ConfigError, RunConfig, differences, load, load_section, parse, to_toml
from autotraj.training import supervised as stages
from tasks.config import TaskConfig
from tool_sandbox.config import SandboxConfig
from trajectory.section import Section

MINIMAL = {"model": "examples/tiny/base"}

# Any text that UTF-8 can hold, and those parts of it that TOML must escape, more often than chance brings them.
TEXT = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(
            ["\r", "\r\n", "\0", "\x7f", "\x85", "\u2028", '"', '"""', "'", "\\", "\\u", "\t", "😀", "#", "=", "[x]"]
        ),
    )
).map("".join)


def test_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match=r"grpo\.num_stepz: unknown key; did you mean 'grpo\.num_steps'\?"):
        parse(MINIMAL | {"grpo": {"num_stepz": 3}})


def test_unknown_section_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"leaner: unknown key; did you mean 'learner'\?"):
        parse(MINIMAL | {"leaner": {}})


def test_all_problems_are_listed_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MINIMAL | {"grpo": {"num_steps": 0, "max_staleness": -1}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("grpo.num_steps:")
    assert "(given: -1)" in lines[1]


def test_a_missing_model_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError, match="model: required; set it in the file or as model=VALUE"):
        parse({})


def test_contradiction_between_sections() -> None:
    with pytest.raises(ConfigError, match=r"exceeds engine\.max_model_len = 64"):
        parse(MINIMAL | {"engine": {"max_model_len": 64}})


def test_a_pass_of_the_learner_holds_the_longest_trajectory() -> None:
    """Found at the first step that has one, else: 768 tokens of prompt and 1024 of response at most."""
    sections = {"episode": {"max_prompt_tokens": 768, "max_response_tokens": 1024}}
    with pytest.raises(
        ConfigError, match=r"learner\.micro_batch_tokens = 1791 is less than the longest trajectory, .*1792"
    ):
        parse(MINIMAL | sections | {"learner": {"micro_batch_tokens": 1791}})
    assert parse(MINIMAL | sections | {"learner": {"micro_batch_tokens": 1792}}).learner.micro_batch_tokens == 1792
    shared = {"num_learners": 2, "sequence_parallel_size": 2}
    with pytest.raises(
        ConfigError, match=r"tokens = 895 · learner\.sequence_parallel_size = 2 is less than the longest"
    ):
        parse(MINIMAL | sections | {"learner": shared | {"micro_batch_tokens": 895}})
    parse(MINIMAL | sections | {"learner": shared | {"micro_batch_tokens": 896}})
    supervised = {"stages": ["synthesize", "sft"], "learner": {"micro_batch_tokens": 1791}}
    assert parse(MINIMAL | sections | supervised).stages == ("synthesize", "sft")  # leaves out what is longer, counted


def test_shared_values_are_set_once() -> None:
    config = parse(MINIMAL | {"episode": {"temperature": 0.7}})
    assert config.learner.model == config.engine.model == "examples/tiny/base"
    assert config.learner.temperature == 0.7
    with pytest.raises(ConfigError, match=r"learner\.model: set `model` instead"):
        parse(MINIMAL | {"learner": {"model": "other"}})


def test_overrides_are_typed_and_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "a"\n[grpo]\nnum_steps = 5\n')
    config = load(path, ["grpo.num_steps=7", "learner.lr=3e-4", "model=b/c", "grpo.dynamic_sampling=true"])
    assert (config.grpo.num_steps, config.learner.lr, config.model) == (7, 3e-4, "b/c")
    assert config.grpo.dynamic_sampling is True


@pytest.mark.parametrize("override", ["num_steps", "=3", "model.x=3"])
def test_malformed_overrides_are_explained(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "a"\n')
    with pytest.raises(ConfigError, match="override"):
        load(path, [override])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("model = [")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(tmp_path / "broken.toml")


def test_resolved_toml_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    config = parse(MINIMAL | {"episode": {"system_prompt": 'say "hi"\n\tto \\boxed{}'}, "grpo": {"num_steps": 7}})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load(path) == config


def test_the_limit_of_older_runs_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"grpo: gate_tolerance is no setting any more: .* Delete the line"):
        parse(MINIMAL | {"grpo": {"gate_tolerance": 0.3}})


@settings(max_examples=200)
@given(
    text=TEXT,
    token=TEXT,
    lr=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    penalty=st.floats(-100, 0.1),
    seed=st.integers(0, 2**32 - 1),
    targets=st.lists(TEXT, min_size=1),
    share=st.floats(0, 1),
)
def test_what_is_written_reads_back_equal(tmp_path_factory, text, token, lr, penalty, seed, targets, share) -> None:  # type: ignore[no-untyped-def]
    config = parse(
        {
            "model": text or "x",
            "seed": seed,
            "episode": {"system_prompt": text},
            "sandbox": {"token": token},
            "learner": {"lr": lr, "lora": {"targets": targets}},
            "reward": {"bad_format_math": penalty},
            "quality": {"weights": {"confidence": share, "length": 1 - share}},
            "repair": {"right_prompt": "{question}{trajectory}" + text},
        }
    )
    path = tmp_path_factory.mktemp("written") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", "\0", "\x1b[2J", "\x7f"])
def test_control_characters_read_back(tmp_path: Path, text: str) -> None:
    config = parse(MINIMAL | {"episode": {"system_prompt": text}, "sandbox": {"token": text}})
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    read = load(tmp_path / "config.toml")
    assert (read.episode.system_prompt, read.sandbox.token) == (text, text)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "a"\nseed = 7\n', encoding="utf-8-sig")
    assert load(path).seed == 7
    path.write_text('[[benchmarks]]\nname = "a"\n[benchmarks.data]\nsource = "a.jsonl"\n', encoding="utf-8-sig")
    assert load_suite(path).benchmarks[0].name == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('model = "é"'.encode("latin-1"), "not UTF-8 text (byte 9 is 0xe9); save it as UTF-8"),
        ('model = "a"'.encode("utf-16"), "not UTF-8 text (byte 0 is 0xff)"),
        (b"model = ", "not valid TOML: Invalid value"),
        (b"model = " + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_toml_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"--config {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it can't be read as a file: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("section", [name for name, _ in RunConfig.model_fields.items()])
def test_a_wrong_type_names_the_key(section: str) -> None:
    """Of every section and every plain field: whatever type it wants, a date is not it."""
    with pytest.raises(ConfigError, match=rf"(?m)^{section}: "):
        parse(MINIMAL | {section: date(2026, 11, 25)})


def test_a_value_where_a_section_belongs_says_so() -> None:
    with pytest.raises(ConfigError, match=r"^engine: a section belongs here: write \[engine\]"):
        parse(MINIMAL | {"engine": 3})
    with pytest.raises(ConfigError, match=r"^sandbox: a section belongs here"):
        load_section(SandboxConfig, "sandbox", None, ["sandbox=[1]"])


def test_a_section_alone_names_its_keys_in_full() -> None:
    with pytest.raises(ConfigError, match=r"^sandbox\.addres: unknown key; did you mean 'sandbox\.address'\?$"):
        load_section(SandboxConfig, "sandbox", None, ["sandbox.addres=1"])
    with pytest.raises(ConfigError, match=r"^sandbx: unknown key; did you mean 'sandbox'\?$"):
        load_section(SandboxConfig, "sandbox", None, ["sandbx.token=abc"])


def test_a_token_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MINIMAL | {"sandbox": {"token": 24681357}})
    assert "sandbox.token: a text belongs here" in str(caught.value)
    assert "24681357" not in str(caught.value)


def test_an_override_is_one_value() -> None:
    assert load(None, ["model=a", "episode.system_prompt=1\nmodel = 'b'"]).episode.system_prompt == "1\nmodel = 'b'"


# --- numbers ------------------------------------------------------------------------------------------------------------


def numbers(section: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type, list[Any]]]:
    """Path, type and constraints of every number in a section and those within it."""
    for name, field in section.model_fields.items():
        yield from _numbers_of(field.annotation, list(field.metadata), (*above, name))


def _numbers_of(
    annotation: Any, constraints: list[Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type, list[Any]]]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _numbers_of(args[0], [*constraints, *args[1:]], path)
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            yield from _numbers_of(arg, constraints, path)
    elif origin in (tuple, list, dict):
        for arg in args:
            yield from _numbers_of(arg, [], path)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield from numbers(annotation, path)
    elif annotation in (int, float):
        yield path, annotation, constraints
    else:
        assert origin is Literal or annotation in (str, bool, type(None), Ellipsis) or annotation is Ellipsis, (
            annotation
        )


ALL_NUMBERS = [*numbers(RunConfig), *numbers(BenchmarkSuite)]


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def test_every_number_has_a_bound() -> None:
    def bounded(constraints: list[Any]) -> bool:
        inner = [c for c in constraints for c in [c, *getattr(c, "metadata", [])]]
        kinds = (annotated_types.Gt, annotated_types.Ge, annotated_types.Lt, annotated_types.Le)
        return any(isinstance(constraint, kinds) for constraint in inner)

    assert len(ALL_NUMBERS) > 150
    assert [".".join(path) for path, _, constraints in ALL_NUMBERS if not bounded(constraints)] == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_every_number_must_be_finite(number: float) -> None:
    several = {
        "betas": [0.9, number],
        "temperatures": [number],
        "tiers": {"easy": number},
        "weights": {"length": number},
    }
    paths = [path for path, kind, _ in numbers(RunConfig) if kind is float and path != ("learner", "temperature")]
    assert len(paths) > 60
    in_a_list = ("reward", "terms", "weight")
    paths.remove(in_a_list)
    with pytest.raises(ConfigError, match=r"^reward\.terms\.0\.weight: "):
        parse(MINIMAL | nested(in_a_list[:-1], [{"use": "module:function", "weight": number}]))
    for path in paths:
        with pytest.raises(ConfigError, match=rf"(?m)^{'.'.join(path)}\b"):
            parse(MINIMAL | nested(path, several.get(path[-1], number)))


@pytest.mark.parametrize(
    "override", ["seed=-1", "seed=4294967296", "data.seed=-1", "learner.seed=-1", "learner.betas=[0.9, 1.0]"]
)
def test_numbers_out_of_bounds(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{override.partition('=')[0]}"):
        load(None, ["model=a", override])


def test_a_time_that_nothing_can_wait_for() -> None:
    with pytest.raises(
        ConfigError, match=r"^grpo\.step_timeout_s: a time of 1e\+12 s is longer than can be waited for"
    ):
        load(None, ["model=a", "grpo.step_timeout_s=1e12"])


def test_an_engine_on_a_gpu_needs_no_second_setting() -> None:
    assert load(None, ["model=a", "engine.device=gpu"]).rollout.num_gpus == 1
    assert load(None, ["model=a", "engine.device=gpu", "engine.tensor_parallel_size=4"]).rollout.num_gpus == 4
    with pytest.raises(ConfigError, match=r"rollout\.num_gpus = 2, but engine\.device = 'gpu'"):
        load(None, ["model=a", "engine.device=gpu", "rollout.num_gpus=2"])
    with pytest.raises(ConfigError, match=r"rollout\.num_gpus = 1, but engine\.device = 'cpu'"):
        load(None, ["model=a", "rollout.num_gpus=1"])


def test_what_an_actor_would_refuse_is_refused_here() -> None:
    with pytest.raises(ConfigError, match="has no room for a repair prompt"):
        parse(
            MINIMAL
            | {"engine": {"max_model_len": 512}, "episode": {"max_prompt_tokens": 256, "max_response_tokens": 256}}
            | {"repair": {"repairer": "engine", "engine": {"model": "b", "max_model_len": 256}}}
        )
    with pytest.raises(ConfigError, match=r"learner\.lora\.dropout=0\.1: engines sample without dropout"):
        load(None, ["model=a", "learner.lora.dropout=0.1"])


def test_a_reward_model_learns_at_any_sampling_temperature() -> None:
    config = load(None, ["model=a", "episode.temperature=0.7"])
    made = stages.learner_config(
        config.learner, model="a", lr=1e-5, steps=9, warmup_ratio=0.1, lora=None, head="scalar"
    )
    assert made.temperature == 1.0


def test_differences_name_the_keys() -> None:
    before = parse(MINIMAL | {"grpo": {"num_steps": 3}})
    after = parse(MINIMAL | {"grpo": {"num_steps": 4}, "sft": {"lora": {"rank": 2}}})
    assert differences(before, after)[0] == "grpo.num_steps = 3, not 4"
    assert "sft.lora.rank = None, not 2" in differences(before, after)
    assert differences(before, before) == []


def test_every_field_is_documented() -> None:
    def undocumented(section: type, prefix: str) -> list[str]:
        found: list[str] = []
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                found += undocumented(inner, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undocumented(RunConfig, "") == []


def test_evaluation_data_that_is_set_in_part_is_not_of_the_split_that_is_trained_on() -> None:
    def data(**settings: object) -> TaskConfig:
        return parse(MINIMAL | {"eval": {"data": settings}}).eval.data

    assert (data(limit=3).split, data().split, data(split="train").split) == ("eval", "eval", "train")
    with pytest.raises(ConfigError, match=r"^eval\.data: set split, as of hf:openai/gsm8k there is none"):
        data(source="hf:openai/gsm8k")
    assert data(source="hf:openai/gsm8k", split="test").split == "test"


def test_a_file_without_a_model_is_told_that_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({})
    assert str(caught.value) == "model: required; set it in the file or as model=VALUE"


def test_a_schedule_that_ends_before_the_run() -> None:
    short = ["model=a", "learner.schedule=cosine", "learner.total_steps=30", "grpo.num_steps=100"]
    message = r"learner\.total_steps = 30 is less than grpo\.num_steps = 100: .* would be 0 from step 31 on\. Set "
    with pytest.raises(ConfigError, match=message + r"learner\.total_steps = 100"):
        load(None, short)
    load(None, [*short, "grpo.num_steps=30"])
    load(None, [*short, "learner.schedule=constant"])
    load(None, [*short, 'stages=["synthesize", "sft"]'])


def test_adapters_are_sent_by_themselves_unless_something_else_is_set() -> None:
    full = load(None, ["model=a"])
    assert (full.engine.weight_transfer, full.learner.weight_sync, full.engine.adapter_rank) == ("host", "host", None)
    for overrides, rank in (([], 16), (["learner.lora.rank=300"], 300)):
        config = load(None, ["model=a", "learner.lora.alpha=8", *overrides])
        assert (config.engine.weight_transfer, config.learner.weight_sync) == ("adapter", "adapter")
        assert config.engine.adapter_rank == rank
        assert parse(tomllib.loads(to_toml(config))) == config
    merged = load(None, ["model=a", "learner.lora.rank=600", "engine.weight_transfer=host"])
    assert (merged.engine.weight_transfer, merged.learner.weight_sync) == ("host", "host")
    for overrides, message in (
        (["learner.lora.rank=600"], r"up to rank 512, not 600: lower learner.lora.rank, or set weight_transfer='host'"),
        (["engine.weight_transfer=adapter"], "needs adapters: set learner.lora, or weight_transfer='host'"),
        (["learner.lora.rank=8", "engine.adapter_rank=8"], "engine.adapter_rank: set `learner.lora.rank` instead"),
        (
            ['learner.lora.targets=["q_proj", "lm_head"]'],
            "has the output layer, lm_head, .* engine.weight_transfer='host'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load(None, ["model=a", *overrides])
