"""Laws of the settings: a mistake is one line that names the nearest right key, and what is written is read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from deltal import algorithm
from deltal.config import ReplayConfig, RunConfig, SplitOff
from deltal.config.algorithm import AlgorithmConfig
from deltal.config.base import Settings
from deltal.config.file import explained, load_config, resolve
from deltal.errors import ConfigError
from tests.unit.builders import run_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PLAIN: dict[str, Any] = {"model": {"kind": "random"}, "data": {"kind": "generated"}}


def leaves(model: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str]]:
    """Every setting of a model and of all that its unions may hold."""
    for name, field in model.model_fields.items():
        inner = list(models(field.annotation))
        for chosen in inner:
            yield from leaves(chosen)
        if not inner:
            yield model, name


def models(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


def refused(values: dict[str, Any], *overrides: str) -> str:
    """The line a mistake leaves."""
    with pytest.raises(ConfigError) as error:
        resolve(values, overrides, where="here.yaml")
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.learning_rat=1e-5", "unknown key learner.learning_rat; did you mean learner.learning_rate?"),
        ("lerner.ranks=2", "unknown key lerner; did you mean learner?"),
        ("rollout.temprature=1", "unknown key rollout.temprature; did you mean rollout.temperature?"),
        (
            "learner.schedule.warmup=3",
            "unknown key learner.schedule.warmup; did you mean learner.schedule.warmup_steps?",
        ),
        ("data.siez=3", "unknown key data.siez; did you mean data.size?"),
        ("model.shape.layer=3", "unknown key model.shape.layer; did you mean model.shape.layers?"),
        ("replay.max_stalenes=3", "unknown key replay.max_stalenes; did you mean replay.max_staleness?"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(override: str, said: str) -> None:
    assert refused(PLAIN, override) == f"here.yaml: {said}"


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (
            {"algorithm": {"aggregation": {"kind": "delta_l", "alfa": 0.5}}},
            "unknown key algorithm.aggregation.alfa; did you mean algorithm.aggregation.alpha?",
        ),
        (
            {"algorithm": {"objective": {"kind": "ppo_clip", "cliphigh": 0.5}}},
            "unknown key algorithm.objective.cliphigh; did you mean algorithm.objective.clip_high?",
        ),
        (
            {"evaluation": {"data": {"kind": "generated", "splt": "test"}}},
            "unknown key evaluation.data.splt; did you mean evaluation.data.split?",
        ),
        (
            {"model": {"kind": "hf", "path": "x", "shape": {"hiden_size": 3}}},
            "unknown key model.shape.hiden_size; did you mean model.shape.hidden_size?",
        ),
    ],
)
def test_an_unknown_key_inside_a_choice_names_the_nearest_one(room: dict[str, Any], said: str) -> None:
    assert refused(PLAIN | room) == f"here.yaml: {said}"


def test_a_misspelt_required_key_is_named_as_misspelt_and_not_as_missing() -> None:
    values = PLAIN | {"model": {"kind": "hf", "pth": "folder"}}
    assert refused(values) == "here.yaml: unknown key model.pth; did you mean model.path?"
    top = {"modell": {"kind": "random"}, "data": {"kind": "generated"}}
    assert refused(top) == "here.yaml: unknown key modell; did you mean model?"


def test_a_missing_key_is_named() -> None:
    assert refused({"data": {"kind": "generated"}}) == "here.yaml: model is missing"
    assert refused(PLAIN | {"data": {"kind": "jsonl"}}) == "here.yaml: data.path is missing"


def test_a_choice_without_its_kind_or_with_another_one_names_the_kinds_there_are() -> None:
    without = refused(PLAIN, "data={size: 5}")
    assert without.startswith("here.yaml: data: `kind` is missing: name one of jsonl, ")
    unknown = refused(PLAIN, "algorithm.aggregation.kind=grop")
    assert "algorithm.aggregation" in unknown
    assert all(kind in unknown for kind in ("'grop'", "delta_l", "dr_grpo", "grpo", "dapo"))


def test_a_choice_that_has_a_default_need_not_name_its_kind() -> None:
    config = resolve(PLAIN, ["algorithm.aggregation.alpha=auto", "algorithm.objective.clip_high=0.28"])
    assert config.algorithm.aggregation.kind == "delta_l"
    assert config.algorithm.aggregation.alpha == "auto"
    assert config.algorithm.objective.kind == "ppo_clip"
    assert "alpha" in refused(PLAIN, "algorithm.aggregation.alpha=autoo")
    assert "is above high" in refused(PLAIN, "algorithm.aggregation.auto={low: 3, high: 1}")
    assert "finite" in refused(PLAIN, "learner.learning_rate=.inf")


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("learner.ranks=two", "learner.ranks", "'two'"),
        ("learner.ranks=0", "learner.ranks", "0"),
        ("learner.learning_rate=fast", "learner.learning_rate", "'fast'"),
        ("learner.learning_rate=.nan", "learner.learning_rate", "nan"),
        ("run.export=perhaps", "run.export", "'perhaps'"),
        ("replay.filter=some", "replay.filter", "'some'"),
        ("learner.betas=[0.9, x]", "learner.betas.1", "'x'"),
        ("algorithm.objective={kind: ppo_clip, clip_low: 2}", "algorithm.objective.clip_low", "2"),
        ("run.name=../escape", "run.name", "'../escape'"),
        ("run.seed=18446744073709551616", "run.seed", "18446744073709551616"),
        ("run.steps=true", "run.steps", "True"),
        ("learner.learning_rate=true", "learner.learning_rate", "True"),
        ("learner.betas=[1.0, 0.9]", "learner.betas.0", "1.0"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(override: str, key: str, given: str) -> None:
    message = refused(PLAIN, override)
    assert message.startswith(f"here.yaml: {key}: ")
    assert message.endswith(f"(got {given})")


def test_being_further_ahead_than_staleness_allows_is_refused() -> None:
    assert "max_ahead = 3 is above max_staleness = 2" in refused(PLAIN, "replay.max_ahead=3", "replay.max_staleness=2")
    assert ReplayConfig(max_ahead=2, max_staleness=2).max_ahead == 2


def test_a_group_larger_than_an_engine_and_more_mini_batches_than_responses_are_refused() -> None:
    assert "must fit into one engine" in refused(PLAIN, "rollout.responses_per_prompt=65")
    too_many = ("algorithm.mini_batches=9", "replay.prompts_per_batch=2", "rollout.responses_per_prompt=4")
    assert "algorithm.mini_batches = 9" in refused(PLAIN, *too_many)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.shape={heads: 3, kv_heads: 2}", "heads = 3 is no multiple of kv_heads = 2"),
        ("model.shape={head_dim: 33}", "head_dim = 33 is odd"),
        (
            "data.kind=jsnl",
            "is none of jsonl, parquet, hf, reasoning_gym, generated; the nearest is jsonl",
        ),
    ],
)
def test_what_no_model_or_source_can_be_is_refused(override: str, said: str) -> None:
    assert said in refused(PLAIN, override)


def test_a_soft_punishment_that_begins_before_the_first_token_is_refused() -> None:
    soft = ("verify.overlong=soft", "rollout.max_response_tokens=200")
    assert "overlong_cache_tokens = 256 is above rollout.max_response_tokens = 200" in refused(PLAIN, *soft)
    assert resolve(PLAIN, [*soft, "verify.overlong_cache_tokens=200"]).verify.overlong == "soft"
    assert resolve(PLAIN, ["rollout.max_response_tokens=200"]).verify.overlong == "wrong"


def test_negative_rewards_and_an_advantage_that_takes_none_are_refused_together() -> None:
    assert "max_rl takes no negative rewards" in refused(PLAIN, "verify.overlong=soft", "algorithm.advantage=max_rl")


@pytest.mark.parametrize(
    ("setting", "registry"),
    [
        ("aggregation", "AGGREGATIONS"), ("objective", "OBJECTIVES"), ("importance", "IMPORTANCE"), ("kl", "KL_TERMS"),
        ("advantage", "ADVANTAGES"),
    ],
)  # fmt: skip
def test_every_kind_of_the_algorithm_has_its_function_and_its_settings(setting: str, registry: str) -> None:
    annotation = AlgorithmConfig.model_fields[setting].annotation
    named = {model.model_fields["kind"].default for model in models(annotation)} or set(get_args(annotation))
    assert named - ({"none"} if setting == "kl" else set()) == getattr(algorithm, registry).keys()


@pytest.mark.parametrize(
    ("overrides", "every_response"),
    [
        ((), False),
        (("algorithm.kl={kind: k1}",), True),
        (("algorithm.kl={kind: k3, coefficient: 0.04}",), True),
        (("algorithm.entropy_coefficient=0.01",), True),
    ],
)
def test_responses_without_advantage_are_trained_where_a_term_needs_them(
    overrides: tuple[str, ...], every_response: bool
) -> None:
    chosen = resolve(PLAIN, overrides).algorithm
    assert chosen.trains_every_response == every_response
    assert chosen.has_reference == any("kl" in override for override in overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("algorithm.objective={kind: ppo_clip, dual_clip: 1.0}", "algorithm.objective.dual_clip"),
        ("algorithm.importance={kind: mask, low: 1.5}", "algorithm.importance.low"),
        ("algorithm.importance={kind: mask, high: 0.5}", "algorithm.importance.high"),
        ("algorithm.importance={kind: truncate, level: word}", "algorithm.importance.level"),
        ("algorithm.kl={kind: k1, coefficient: 0}", "algorithm.kl.coefficient"),
        ("algorithm.entropy_coefficient=-1", "algorithm.entropy_coefficient"),
        ("verify.overlong_cache_tokens=0", "verify.overlong_cache_tokens"),
    ],
)
def test_a_setting_of_the_algorithm_out_of_its_range_is_refused(override: str, key: str) -> None:
    assert refused(PLAIN, override).startswith(f"here.yaml: {key}: ")


@pytest.mark.parametrize(
    ("override", "room", "key", "value"),
    [
        ("learner.learning_rate=1e-5", "learner", "learning_rate", 1e-5),
        ("learner.learning_rate=3E-6", "learner", "learning_rate", 3e-6),
        ("run.steps=7", "run", "steps", 7),
        ("run.export=false", "run", "export", False),
        ("run.name=first-try", "run", "name", "first-try"),
        ("run.name=null", "run", "name", None),
        ("learner.betas=[0.8, 0.99]", "learner", "betas", (0.8, 0.99)),
        ("chat.prefill=<think>", "chat", "prefill", "<think>"),
        ("chat.system_prompt='a: b = c'", "chat", "system_prompt", "a: b = c"),
        ("run.name='2026'", "run", "name", "2026"),
        ("algorithm.entropy_coefficient=1e-2", "algorithm", "entropy_coefficient", 0.01),
        (" run.seed =-3", "run", "seed", -3),
    ],
)
def test_an_override_has_the_type_of_its_setting(override: str, room: str, key: str, value: Any) -> None:
    got = getattr(getattr(resolve(PLAIN, [override]), room), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["learner.ranks", "=3", "learner..ranks=3", ".ranks=3", "learner.=3"])
def test_an_override_of_another_form_is_refused_with_an_example(text: str) -> None:
    assert "must look like learner.learning_rate=1e-5" in refused(PLAIN, text)


def test_an_override_below_a_plain_value_is_refused() -> None:
    assert "steps is a plain value and has no more" in refused(PLAIN | {"run": {"steps": 3}}, "run.steps.more=1")


def test_the_last_of_two_overrides_counts_and_the_given_values_stay_as_they_are() -> None:
    values = {**PLAIN, "run": {"steps": 3}}
    assert resolve(values, ["run.steps=4", "run.steps=5"]).run.steps == 5
    assert values == {**PLAIN, "run": {"steps": 3}}


def test_an_empty_section_may_be_overridden() -> None:
    assert resolve(PLAIN | {"run": None}, ["run.steps=5"]).run.steps == 5


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("kind", ["delta_l", "dr_grpo", "grpo", "dapo", "sequence_sum"])
def test_the_aggregation_of_every_file_can_be_chosen_by_its_kind_alone(file: Path, kind: str) -> None:
    assert load_config(str(file), [f"algorithm.aggregation.kind={kind}"]).algorithm.aggregation.kind == kind


def test_another_kind_leaves_behind_only_what_the_former_kind_alone_has() -> None:
    values = PLAIN | {"data": {"kind": "jsonl", "path": "rows.jsonl", "task": "math"}}
    assert resolve(values, ["data.kind=parquet"]).data.model_dump(exclude_unset=True) == {
        "kind": "parquet", "path": "rows.jsonl", "task": "math"
    }  # fmt: skip
    typo = PLAIN | {"algorithm": {"aggregation": {"kind": "delta_l", "alhpa": 1.0}}}
    assert "unknown key algorithm.aggregation.alhpa" in refused(typo, "algorithm.aggregation.kind=grpo")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_setting_that_the_chosen_kind_does_not_have_is_refused_in_any_order(reverse: bool) -> None:
    overrides = ["algorithm.aggregation.alpha=0.5", "algorithm.aggregation.kind=grpo"]
    values = PLAIN | {"algorithm": {"aggregation": {"kind": "delta_l", "alpha": 1.0}}}
    assert "unknown key algorithm.aggregation.alpha" in refused(values, *(overrides[::-1] if reverse else overrides))


def test_a_missing_file_names_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("tiny.yaml", "countdown.yaml"):
        (tmp_path / "configs" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    for asked in ("configs/tinny.yaml", "configs/tiny.yml", "tiny.yaml"):
        with pytest.raises(ConfigError) as error:
            load_config(asked)
        assert str(error.value) == f"no configuration file {asked}; did you mean configs/tiny.yaml?"
    with pytest.raises(ConfigError, match=r"no configuration file configs$"):
        load_config("configs")


@pytest.mark.parametrize(
    ("text", "line"),
    [("run: {steps: 3\nmodel: {}\n", 2), ("run:\n  steps: 3\n bad: 1\n", 3), ("run:\n\t steps: 3\n", 2)],
)
def test_broken_yaml_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(file))
    assert str(error.value).startswith(f"{file}:{line}: this is no valid YAML: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "list.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="a configuration is a mapping of keys to values"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: {steps: 6}\nrollout: {workers: 1}\nrollout: {max_sequences: 9}\n", ":3: .*the key rollout stands twice"),
        ("run: {steps: 6, steps: 60}\n", ":1: .*the key steps stands twice"),
        ("run: &r {x: *r}\n", "nested too deeply, or it refers to itself"),
        ("run: " + "[" * 3000, "nested too deeply"),
        ('chat: {prefill: "\\ud800"}\n', "half a character"),
    ],
    ids=["section", "key", "circle", "depth", "surrogate"],
)
def test_a_file_that_would_be_read_otherwise_than_written_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)


def test_half_a_character_in_an_override_is_refused() -> None:
    assert "half a character" in refused(PLAIN, 'chat.system_prompt="\\ud800"')


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ConfigError, match=r"binary\.yaml: this is no valid YAML"):
        load_config(str(file))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_we_ship_loads(file: Path) -> None:
    assert isinstance(load_config(str(file)), RunConfig)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_what_is_dumped_loads_as_the_same_settings(file: Path, tmp_path: Path) -> None:
    config = load_config(str(file))
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    assert load_config(str(copy)) == config


@settings(max_examples=40)
@given(
    rate=st.floats(1e-12, 1e3),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
    # PyYAML reads back U+0085 and its like as line ends; nobody prompts with them.
    text=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], include_characters="\n\t"), max_size=30),
    seed=st.integers(-(2**63), 2**63),
)
def test_every_value_survives_the_way_through_yaml(rate: float, name: str, text: str, seed: int) -> None:
    config = run_config(
        run={"name": name, "seed": seed}, learner={"learning_rate": rate}, chat={"prefill": text, "system_prompt": text}
    )
    dumped = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert resolve(yaml.safe_load(dumped)) == config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_setting_of_a_run_is_explained_once(file: Path) -> None:
    config = load_config(str(file))
    rows = list(explained(config))
    assert all(meaning.strip() for _, _, meaning in rows)
    keys = [key for key, _, _ in rows]
    assert len(keys) == len(set(keys))

    def dotted(values: Any, model: Any, prefix: str = "") -> Iterator[str]:
        for key, value in values.items():
            inner = getattr(model, key)
            if isinstance(inner, BaseModel):
                yield from dotted(value, inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    assert keys == list(dotted(config.model_dump(), config))


def test_every_setting_there_is_has_an_explanation() -> None:
    for model, name in leaves(RunConfig):
        assert name == "kind" or model.model_fields[name].description, f"{model.__name__}.{name}"
        assert (model.__doc__ or "").strip(), model.__name__


def test_settings_cannot_be_changed_once_resolved() -> None:
    config = resolve(PLAIN)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data:\nkind: jsonl\npath: x", "the key kind stands at top level; it belongs below data: indent"),
        ("data: {kind: generated}\nsteps: 5", "the key steps stands at top level; it belongs below run: indent"),
        ("data: {kind: generated}\nrollout:\nworkers: 5", "it belongs below rollout: indent its line there"),
        ("data: {kind: generated}\nalpha: 1", r"below algorithm\.aggregation, .*algorithm\.aggregation\.alpha=…"),
        ("data: {kind: generated}\nrolout: {}", "unknown key rolout; did you mean rollout"),
    ],
)
def test_a_key_that_slid_out_of_its_section_is_told_where_it_belongs(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{kind: random}}\n{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [["evaluation.data={split_off: 7}"], ["evaluation.data.kind=split_off", "evaluation.data.rows=7"]],
)
def test_rows_held_out_can_be_asked_for_in_short_and_in_full(overrides: list[str]) -> None:
    values = {"model": {"kind": "random"}, "data": {"kind": "generated"}}
    for before in (None, {"kind": "generated", "name": "letters", "split": "test"}):
        data = resolve(values | {"evaluation": {"data": before}}, overrides).evaluation.data
        assert data == SplitOff(rows=7)
        assert resolve(resolve(values, overrides).model_dump(mode="json")).evaluation.data == data


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{split_off: 0}", r"evaluation\.data\.rows: .*greater than or equal to 1"),
        ("{split_off: many}", r"evaluation\.data\.rows: "),
        ("{split_off: 5, kind: jsonl}", r"split_off stands alone: evaluation\.data=\{split_off: 5\}"),
        ("{kind: split_of}", "the nearest is split_off"),
    ],
)
def test_rows_held_out_in_a_wrong_way_are_refused(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"model": {"kind": "random"}, "data": {"kind": "generated"}}, [f"evaluation.data={value}"])
    with pytest.raises(ConfigError, match=r"data\.kind = 'split_off' is none of"):
        resolve({"model": {"kind": "random"}, "data": {"kind": "split_off", "rows": 1}})
