"""Loading a configuration: everything wrong is found here, with the key's name."""

from pathlib import Path

import pytest

from autotraj.config import ConfigError, RunConfig, load, parse, to_toml

MINIMAL = {"model": "examples/tiny/base"}


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
    config = parse(
        MINIMAL | {"episode": {"system_prompt": 'say "hi"\n\tto \\boxed{}'}, "grpo": {"gate_tolerance": 1e-5}}
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load(path) == config


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
