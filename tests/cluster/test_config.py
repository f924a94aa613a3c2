"""YAML goes through one door, and whatever is wrong in it is named."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster.config import (
    AppConfig,
    EngineConfig,
    check_pools,
    check_ray_config,
    parse_method,
)
from cluster.strict import load_yaml, parse
from cluster.yaml_file import read_yaml
from spts.errors import ConfigError
from spts.methods import Dense, Spts
from spts.schedule import Schedule
from tests.cluster.conftest import REPOSITORY
from tests.cluster.tiny import SCHEDULE
from tests.fakes import FakeGroup

# Ray's own models use what pydantic deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ARGS = {
    "engines": {"default": {"model": "jobs/demo_model"}},
    "pools": [
        {"max_prompt_tokens": 1024, "method": {"name": "dense"}},
        {"method": {"name": "spts", "schedule": "demo-12l"}},
    ],
}
FILE = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {"name": "spts", "import_path": "cluster.app:build", "route_prefix": "/", "args": ARGS},
    ],
}


def changed(data, path: str, value):
    """`data` with the value at a dotted path replaced or added."""
    data = copy.deepcopy(data)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = data
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return data


def test_a_budget_must_be_left_between_the_limits():
    args = {**ARGS, "min_budget_tokens": 64}
    assert parse(args, AppConfig, source="args").most_budget_tokens == 2048, "the largest of demo-12l"
    assert parse({**args, "max_budget_tokens": 64}, AppConfig, source="args").most_budget_tokens == 64
    with pytest.raises(ConfigError, match="max_budget_tokens must be at least min_budget_tokens = 64"):
        parse({**args, "max_budget_tokens": 63}, AppConfig, source="args")
    dense = {**ARGS, "pools": [{"method": {"name": "dense"}}]}
    assert parse(dense, AppConfig, source="args").most_budget_tokens is None


def test_defaults_serve_one_rank_on_the_cpu():
    config = EngineConfig(model="m")
    assert (config.device, config.dtype, config.tensor_parallel_size, config.num_threads) == (
        "cpu",
        "float32",
        1,
        1,
    )


def test_a_config_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        EngineConfig(model="m").model = "other"  # type: ignore[misc]


def test_pools_and_names():
    app = parse(ARGS, AppConfig, source="args")
    assert (app.model, app.model_name) == ("jobs/demo_model", "demo_model")
    assert app.pools[0].max_prompt_tokens == 1024
    assert parse({**ARGS, "served_model_name": "x"}, AppConfig, source="args").model_name == "x"


def test_methods_by_schedule_or_by_preset():
    assert parse_method({"name": "dense"}) == Dense()
    assert parse_method({"name": "spts", "schedule": "demo-12l"}) == Spts(
        schedule=Schedule.preset("demo-12l")
    )
    written = {"name": "spts", "schedule": SCHEDULE.to_dict()}
    assert parse_method(written) == Spts(schedule=SCHEDULE)
    sparse = {"name": "spts", "schedule": {"preset": "demo-12l", "attention_density": 0.1}}
    assert parse_method(sparse) == Spts(schedule=replace(Schedule.preset("demo-12l"), attention_density=0.1))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"preset": "demo"}, "method.schedule must be a schedule or one of llama-3.1-8b, .*, got 'demo'"),
        ({"preset": ["demo-12l"]}, r"method.schedule must be .*, got \['demo-12l'\]"),
        ({"preset": "demo-12l", "scaled": True}, r"method.schedule.scaled must be a known key \(preset, "),
        ({"preset": "demo-12l", "attention_density": 0}, "attention_density must be a number above 0"),
    ],
)
def test_a_preset_with_something_else_is_refused_by_name(schedule, message):
    with pytest.raises(ConfigError, match=message):
        parse_method({"name": "spts", "schedule": schedule})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "modle",
            1,
            r"args: modle must be one of served_model_name, engines, .*, got an unknown key; remove it",
        ),
        ("engines.default.treads", 2, r"engines.default.treads must be one of model, dtype, .*unknown key"),
        ("pools.0.methd", {}, r"pools.0.methd must be one of engine, max_prompt_tokens, method"),
        (
            "engines.default.tensor_parallel_size",
            0,
            r"tensor_parallel_size must be greater than .* 1, got 0",
        ),
        ("engines.default.dtype", "int4", r"dtype must be 'float32', 'bfloat16' or 'float16', got 'int4'"),
        ("engines.default.num_threads", "2", r"num_threads must be a valid integer, got '2'"),
        ("engines", {}, r"engines must .* at least 1"),
        ("pools.0.engine", "big", r"pools.0.engine must be one of default, got 'big'"),
        (
            "pools.0.max_prompt_tokens",
            None,
            r"pools.0.max_prompt_tokens must grow .*, got None",
        ),
        ("pools.1.max_prompt_tokens", 9, r"pools.1.max_prompt_tokens must be null in the last pool, got 9"),
        ("pools.1.method", {"name": "magic"}, r"pools.1.method.name must be one of dense, spts"),
        (
            "pools.1.method",
            {"name": "spts", "schedule": "demo"},
            r"a schedule or one of .*demo-12l.*'demo'",
        ),
        ("engines.other", {"model": "m2"}, r"engines.\*.model must be the same for all engines"),
    ],
)
def test_faults_in_args_are_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse(changed(ARGS, path, value), AppConfig, source="args")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"last_layer": 6, "active_tokens": 0}, "active_tokens must be an integer of at least 1, got 0"),
        ({"last_layer": 99, "active_tokens": 8}, "last_layer must be below num_layers = 12, got 99"),
        (
            {"last_layer": 6, "active_tokens": 8, "keep_tokens": 0},
            "keep_tokens must be an integer of at least 1",
        ),
        ({"last_layer": 6, "active_token": 8}, "got 'active_token'; remove it or correct its name"),
    ],
)
def test_faults_in_a_schedule_are_named_through_the_yaml_door(stage, message):
    schedule = {"num_layers": 12, "first_skip_layer": 4, "stages": [stage]}
    data = changed(ARGS, "pools.1.method", {"name": "spts", "schedule": schedule})
    with pytest.raises(ConfigError, match=message):
        parse(data, AppConfig, source="args")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"replicas": 0}, r"engines.default.replicas must be greater than or equal to 1, got 0"),
        ({"replicas": "2"}, r"engines.default.replicas must be a valid integer, got '2'"),
        ({"affinity_tokens": -1}, r"engines.default.affinity_tokens must be greater than or equal to 0"),
        ({"autoscaling": {}}, r"engines.default.autoscaling.max_replicas must be given"),
        (
            {"autoscaling": {"max_replica": 3}},
            r"engines.default.autoscaling.max_replica must be one of max_replicas, queued_prefill_tokens,",
        ),
        (
            {"replicas": 3, "autoscaling": {"max_replicas": 3}},
            r"engines.default: autoscaling.max_replicas must be more than replicas = 3, got 3; raise it",
        ),
        (
            {"autoscaling": {"max_replicas": 3, "queued_prefill_tokens": 0}},
            r"autoscaling.queued_prefill_tokens must be greater than or equal to 1",
        ),
        (
            {"autoscaling": {"max_replicas": 3, "upscale_delay_s": float("nan")}},
            r"autoscaling.upscale_delay_s must be .*nan",
        ),
        (
            {"autoscaling": {"max_replicas": 3, "look_back_period_s": 0}},
            r"autoscaling.look_back_period_s must be greater than 0",
        ),
    ],
)
def test_faults_in_the_number_of_replicas_are_named(tmp_path, engine, message):
    path = tmp_path / "ray_config.yaml"
    file = changed(FILE, "applications.0.args.engines.default", {"model": "jobs/demo_model", **engine})
    path.write_text(yaml.safe_dump(file))
    with pytest.raises(ConfigError, match=message):
        check_ray_config(path)


def test_one_replica_is_the_default_and_a_sweeps_engine_has_none():
    engine = parse(ARGS, AppConfig, source="args").engines["default"]
    assert (engine.replicas, engine.max_replicas, engine.autoscaling) == (1, 1, None)
    with pytest.raises(ConfigError, match=r"engine: replicas must be one of .*, got an unknown key"):
        parse({"model": "m", "replicas": 2}, EngineConfig, source="engine")


def test_the_example_for_several_gpus_is_valid():
    app = check_ray_config(REPOSITORY / "docs" / "gpus.yaml")
    assert {name: engine.max_replicas for name, engine in app.engines.items()} == {"short": 2, "long": 4}


def test_the_whole_file_is_checked(tmp_path):
    path = tmp_path / "ray_config.yaml"
    path.write_text(yaml.safe_dump(FILE))
    assert check_ray_config(path).model_name == "demo_model"


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (
            "http_option",
            {},
            r"ray_config.yaml: http_option must be one of .*http_options",
        ),
        ("http_options.prot", 1, r"http_options.prot must be one of .*port"),
        ("applications.0.import_pth", "x", r"applications.0.import_pth must be one of .*import_path"),
        (
            "applications.0.deployments",
            [{"name": "Router", "max_ongoing_request": 5}],
            r"applications.0.deployments.0.max_ongoing_request must be one of .*max_ongoing_requests",
        ),
        (
            "applications.0.deployments",
            [{"name": "Router", "ray_actor_options": {"num_cpu": 1}}],
            r"deployments.0.ray_actor_options.num_cpu must be one of .*num_cpus",
        ),
        (
            "applications.0.deployments",
            [{"name": "Router", "autoscaling_config": {"min_replica": 1}}],
            r"autoscaling_config.min_replica must be one of .*min_replicas",
        ),
        (
            "applications.0.args.engines.default.mdel",
            "m",
            r"0.args: engines.default.mdel must be one of",
        ),
        ("applications", [], r"applications must hold one application, got 0"),
        (
            "applications.0.args.pools.1.method.schedule",
            "llama-3.1-8b",
            r"0.args: pools.1.method: schedule.num_layers must equal the model's 12 layers, got 32",
        ),
        (
            "applications.0.args.engines.default.proxies",
            "docs",
            r"pools.1.method.name must not need proxies on a model without them, got 'spts' .*docs; fit them",
        ),
        (
            "applications.0.args.pools.1.method.schedule",
            {
                "num_layers": 12,
                "first_skip_layer": 3,
                "stages": [{"last_layer": 10, "active_tokens": 256, "keep_tokens": None}],
            },
            r"first_skip_layer must be at least 4, the first layer with a proxy in .* got 3",
        ),
    ],
)
def test_a_typo_anywhere_in_the_file_is_named(tmp_path, at, value, message):
    path = tmp_path / "ray_config.yaml"
    path.write_text(yaml.safe_dump(changed(FILE, at, value)))
    with pytest.raises(ConfigError, match=message):
        check_ray_config(path)


def test_an_application_is_built_of_pools_that_can_run():
    from cluster.app import build

    assert build(ARGS)
    with pytest.raises(
        ConfigError, match=r"pools.1.method: schedule.num_layers must equal .* 12 layers, got 28"
    ):
        build(changed(ARGS, "pools.1.method.schedule", "qwen2.5-7b"))


def test_an_engine_is_told_under_which_method_its_longest_prompts_run():
    from cluster.app import build

    [engine] = build(ARGS)._bound_deployment.init_args
    config, methods, runs = engine._bound_deployment.init_args
    assert config["model"] == "jobs/demo_model"
    assert methods == [{"name": "spts", "schedule": "demo-12l"}], "the other pool's prompts are short"
    assert runs == {"pools.0.method": {"name": "dense"}, "pools.1.method": methods[0]}


SKIPS: dict[str, Any] = {"name": "spts", "schedule": "demo-12l"}
SHORT: dict[str, Any] = {
    "engines": {
        "default": {"model": "jobs/demo_model"},
        "short": {"model": "jobs/demo_model", "proxies": "docs"},
    },
    "pools": [
        {"max_prompt_tokens": 512, "method": {"name": "dense"}, "engine": "short"},
        {"max_prompt_tokens": 1024, "method": {**SKIPS, "ffn_score": "attention"}},
        {"method": SKIPS},
    ],
}


def test_an_engine_has_to_run_what_requests_may_choose_there():
    """Engines of one model may have proxies of their own; a method goes wherever its prompt's length does."""
    app = parse(SHORT, AppConfig, source="args")
    assert [*app.methods_on("short")] == ["pools.0.method", "pools.2.method"], "a choice is as the last pool"
    assert [*app.methods_on("default")] == ["pools.0.method", "pools.1.method", "pools.2.method"]
    with pytest.raises(
        ConfigError,
        match=r"engines.short must run every method that a request may choose, got pools.2.method, which it "
        r"cannot: pools.2.method.name must not need proxies .*, or leave it out of allowed_methods",
    ):
        check_pools(app)
    for allowed in ([], ["dense", "random"]):
        app = parse({**SHORT, "allowed_methods": allowed}, AppConfig, source="args")
        assert [*app.methods_on("short")] == ["pools.0.method"]
        check_pools(app)
    spare = {**ARGS, "engines": SHORT["engines"]}
    check_pools(parse(spare, AppConfig, source="args"))  # no prompt comes there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 7}, r"pools.1.method: schedule.num_layers must equal the model's 6 layers, got 7"),
        ({"first_skip_layer": 1}, r"pools.1.method: schedule must skip in no layer before 2, the first with"),
        ({}, None),
    ],
)
async def test_an_engine_of_a_model_that_is_elsewhere_starts_only_if_it_can_run_its_methods(
    monkeypatch, change, message
):
    from cluster.app import EngineDeployment

    groups: list[FakeGroup] = []

    def group(config):
        groups.append(FakeGroup(config))
        return groups[-1]

    monkeypatch.setattr("cluster.engine.RayGroup", group)
    monkeypatch.setattr("cluster.app.log_as_serve_does", lambda: None)
    runs = {"pools.1.method": {"name": "spts", "schedule": {**SCHEDULE.to_dict(), **change}}}
    engine = EngineDeployment.__new__(EngineDeployment)
    start = EngineDeployment.__init__(engine, {"model": "owner/name"}, [], runs)
    if message is None:
        await start
        assert await engine.ready()
        await engine.shutdown()
    else:
        with pytest.raises(ConfigError, match=message):
            await start
    assert groups[0].closed, "no rank is left behind"


def test_pools_of_a_model_that_is_elsewhere_are_left_to_its_engines():
    check_pools(parse(changed(ARGS, "engines.default.model", "owner/name"), AppConfig, source="args"))


def test_a_file_that_is_missing_or_not_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml must be a readable YAML file, got No such file"):
        load_yaml(tmp_path / "none.yaml", AppConfig)
    for content in (b"a: [1", b"a: \xe9"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad.yaml must be a YAML file"):
            load_yaml(tmp_path / "bad.yaml", AppConfig)


def test_a_key_that_is_given_twice_is_refused_but_a_merged_one_may_be(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("samples: 2\nseeds: [0]\nsamples: 5\n")
    with pytest.raises(ConfigError, match="key 'samples' twice in a mapping"):
        read_yaml(path)
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, x: 4}\nd: *b\n")
    merged = {"x": 1, "y": 3}
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": merged, "c": {"x": 4, "y": 3}, "d": merged}
