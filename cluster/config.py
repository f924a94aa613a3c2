"""What engines and the endpoint are configured with, checked whole before anything starts.

python -m cluster.config ray_config.yaml      checks the whole file, Serve's own blocks included, deploys
nothing
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.origins import check_origins
from cluster.strict import Strict, brief, explain, parse, refuse_unknown_keys
from cluster.yaml_file import read_yaml
from spts import methods
from spts.errors import ConfigError, check_keys
from spts.methods import Method
from spts.schedule import PRESETS


class EngineConfig(Strict):
    """One engine: a model on a group of tensor-parallel ranks.

    model: folder (relative ones are looked for in the working directory, then beside the packages) or hub id.
    proxies: folder of fitted proxies; None = the model folder's own. max_model_len: prompt plus new tokens;
    None = the model's. num_threads: CPU threads per rank. max_running, max_waiting, max_waiting_tokens: see
    `cluster.scheduler.Scheduler`. slice_tokens: between two tokens of a running stream at most as much of a
    prompt is computed as a dense prefill of so many tokens costs, however long the prompt; a layer that skips
    tokens is never divided (`spts.prefill`). null = a prefill is never sliced.
    kv_cache_bytes: memory on each rank for what requests hold while they are computed and for what is kept of
    prompts; null = 90 % of what a GPU has free once the model is loaded, and a fifth of what memory a CPU
    machine has free, shared by the ranks. One dense request of max_model_len must fit, and one of the last
    pool's method if it runs here.
    prefix_cache_bytes: of these, the most that is kept of prompts for others that begin alike, the least
    recently used dropped first, and earlier when requests need the room; `spts.cost.prefix_bytes` says what a
    prompt takes, and of one that takes more its first tokens that fit are kept. 0 = nothing is kept.
    start_timeout_s: to load the model. step_timeout_s: a step that takes longer means a rank hangs, and the
    group restarts. max_restarts: failed starts in a row after which the engine gives up.
    heartbeat_timeout_s: a step that takes longer makes the engine not ready until it ends; when it has not
    ended step_timeout_s later either, the engine is unhealthy and Serve replaces it.
    reference_cache_bytes: host memory for the dense distributions that followed requests are compared with,
    the least recently used dropped first. With 128,000 tokens in the vocabulary one followed token takes 512
    KB, so the default holds 1,048 of them; 0 = computed anew for every request.
    """

    model: str = Field(min_length=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel_size: int = Field(default=1, ge=1)
    proxies: str | None = Field(default=None, min_length=1)
    max_model_len: int | None = Field(default=None, ge=2)
    num_threads: int = Field(default=1, ge=1)
    max_running: int = Field(default=32, ge=1)
    max_waiting: int = Field(default=64, ge=0)
    max_waiting_tokens: int = Field(default=2**20, ge=1)
    slice_tokens: int | None = Field(default=1024, ge=64)
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    start_timeout_s: float = Field(default=600.0, gt=0)
    step_timeout_s: float = Field(default=300.0, gt=0)
    max_restarts: int = Field(default=3, ge=0)
    heartbeat_timeout_s: float = Field(default=60.0, gt=0)
    prefix_cache_bytes: int = Field(default=2**31, ge=0)
    reference_cache_bytes: int = Field(default=2**29, ge=0)


class ScalingConfig(Strict):
    """More replicas of an engine while prompts queue, fewer when they do not.

    max_replicas: the most; `replicas` of the engine is the least. queued_prefill_tokens: as many prompt
    tokens waiting to be read, over all replicas, call for one replica. The rest is as in Serve's own
    autoscaling_config: seconds that more (upscale_delay_s) or fewer (downscale_delay_s) must have been called
    for, and over which queues are averaged (look_back_period_s).
    """

    max_replicas: int = Field(ge=2)
    queued_prefill_tokens: int = Field(default=2**15, ge=1)
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)
    look_back_period_s: float = Field(default=30.0, gt=0)


class ServedEngineConfig(EngineConfig):
    """An engine behind the endpoint: any number of replicas of it, each a group of ranks of its own.

    replicas: how many, or the least of them with autoscaling. affinity_tokens: a prompt goes to the replica
    that lately read its beginning, unless that one has more prompt tokens ahead than the least loaded one by
    more than this or by more than it has read; 0 = only where both have the same ahead.
    """

    replicas: int = Field(default=1, ge=1)
    autoscaling: ScalingConfig | None = None
    affinity_tokens: int = Field(default=2**15, ge=0)

    @model_validator(mode="after")
    def _more_than_the_least(self) -> ServedEngineConfig:
        if self.autoscaling is not None and self.autoscaling.max_replicas <= self.replicas:
            raise ValueError(
                f"autoscaling.max_replicas must be more than replicas = {self.replicas}, got "
                f"{self.autoscaling.max_replicas}; raise it, or leave autoscaling out"
            )
        return self

    @property
    def max_replicas(self) -> int:
        """The most replicas that there may be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def max_requests(self) -> int:
        """The most requests that may run and wait at once, in all replicas that there may be."""
        return (self.max_running + self.max_waiting) * self.max_replicas


class PoolConfig(Strict):
    """One row of the router's table: prompts of up to `max_prompt_tokens` (None = any) run `method` on
    `engine`.

    method: {name: dense}, or {name: spts, schedule: ...} with the name of a preset, {preset,
    attention_density}, or a schedule's own keys.
    """

    engine: str = "default"
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    method: dict[str, Any]

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, value: dict[str, Any]) -> dict[str, Any]:
        parse_method(value)
        return value


class AppConfig(Strict):
    """`args` of ray_config.yaml: the engines, and which prompt goes to which.

    served_model_name: the name clients ask for; None = the model folder's name. pools: by prompt length,
    shortest first; the last one takes the rest. request_timeout_s: deadline of every request.
    max_prompts: prompts x n in one HTTP request. api_keys_file: absolute path of a text file where the router
    runs, one key a line, # begins a comment; api_keys_env: name of an environment variable there, keys
    separated by commas or lines. Either, both, or neither for an endpoint without keys.
    cors_origins: sites whose pages a browser lets ask; none, exact origins, or "*" for any.
    max_echo_tokens: longest prompt whose own log-probabilities a request may ask for (echo); all of its
    distributions are in memory at once, and other requests wait. allowed_methods: what a request may choose.
    min_budget_tokens: least active_tokens and keep_tokens of a schedule that a request brings.
    max_budget_tokens: the most; None = the largest active_tokens of `pools`, any if none of them skips.
    default_max_tokens: of a chat that does not say how long its answer may be, for which memory is reserved.
    """

    served_model_name: str | None = None
    engines: dict[str, ServedEngineConfig] = Field(min_length=1)
    pools: Annotated[tuple[PoolConfig, ...], Field(min_length=1, strict=False)]
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_prompts: int = Field(default=64, ge=1)
    api_keys_file: str | None = Field(default=None, min_length=1)
    api_keys_env: str | None = Field(default=None, min_length=1)
    cors_origins: Annotated[tuple[str, ...], Field(strict=False)] = ()
    max_echo_tokens: int = Field(default=2048, ge=0)
    allowed_methods: Annotated[tuple[str, ...], Field(strict=False)] = tuple(methods.METHODS)
    min_budget_tokens: int = Field(default=1, ge=1)
    max_budget_tokens: int | None = Field(default=None, ge=1)
    default_max_tokens: int = Field(default=1024, ge=1)

    @field_validator("api_keys_file")
    @classmethod
    def _keys_have_a_whole_path(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError(
                f"api_keys_file must be an absolute path, got {value!r}; a router has a working directory of "
                "its own"
            )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_as_browsers_send_them(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_origins(value)
        return value

    @field_validator("allowed_methods")
    @classmethod
    def _methods_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in methods.METHODS]
        if unknown:
            raise ValueError(
                f"allowed_methods must hold names of {', '.join(methods.METHODS)}, got {unknown[0]!r}; "
                "correct it"
            )
        return value

    @model_validator(mode="after")
    def _some_budget_is_left(self) -> AppConfig:
        most = self.max_budget_tokens
        if most is not None and most < self.min_budget_tokens:
            raise ValueError(
                f"max_budget_tokens must be at least min_budget_tokens = {self.min_budget_tokens}, got "
                f"{most}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _pools_fit_together(self) -> AppConfig:
        for index, pool in enumerate(self.pools):
            if pool.engine not in self.engines:
                raise ValueError(
                    f"pools.{index}.engine must be one of {', '.join(self.engines)}, got {pool.engine!r}; "
                    "name an engine of this file"
                )
        *bounded, last = (pool.max_prompt_tokens for pool in self.pools)
        if last is not None:
            raise ValueError(
                f"pools.{len(bounded)}.max_prompt_tokens must be null in the last pool, got {last}; "
                "it takes the prompts that are left"
            )
        for index, limit in enumerate(bounded):
            if limit is None or (index and limit <= (bounded[index - 1] or 0)):
                raise ValueError(
                    f"pools.{index}.max_prompt_tokens must grow from pool to pool, got {limit}; order the "
                    "pools"
                )
        models = {engine.model for engine in self.engines.values()}
        if len(models) > 1:
            raise ValueError(
                f"engines.*.model must be the same for all engines, got {', '.join(sorted(models))}; "
                "deploy one application per model"
            )
        return self

    @property
    def model(self) -> str:
        """The model that every engine runs."""
        return next(iter(self.engines.values())).model

    def methods_on(self, engine: str) -> dict[str, dict[str, Any]]:
        """By their keys, the methods that may run on an engine: its own pools', and those that a request may
        choose wherever its prompt's length sends it, of each of `allowed_methods` the last pool's."""
        own = {index for index, pool in enumerate(self.pools) if pool.engine == engine}
        last = {pool.method["name"]: index for index, pool in enumerate(self.pools)}
        chosen = {last[name] for name in self.allowed_methods if own and name in last}
        return {f"pools.{index}.method": self.pools[index].method for index in sorted(own | chosen)}

    @property
    def most_budget_tokens(self) -> int | None:
        """`max_budget_tokens`, or what it is by default; None = no limit."""
        if self.max_budget_tokens is not None:
            return self.max_budget_tokens
        schedules = [getattr(parse_method(pool.method), "schedule", None) for pool in self.pools]
        stages = [stage for schedule in schedules if schedule is not None for stage in schedule.stages]
        return max((stage.active_tokens for stage in stages), default=None)

    @property
    def model_name(self) -> str:
        """The name clients ask for."""
        return self.served_model_name or Path(self.model).name


def parse_method(data: Mapping[str, Any]) -> Method:
    """`methods.from_dict`, where `schedule` may also be a preset's name, or {preset, attention_density}.
    Raises ConfigError."""
    schedule = data.get("schedule")
    if isinstance(schedule, str):
        schedule = {"preset": schedule}
    if isinstance(schedule, Mapping) and "preset" in schedule:
        check_keys("method.schedule", schedule, required=("preset",), optional=("attention_density",))
        name = schedule["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(
                f"method.schedule must be a schedule or one of {', '.join(PRESETS)}, got {brief(name)}; "
                "correct it",
                field="method.schedule",
            )
        given = {key: value for key, value in schedule.items() if key != "preset"}
        data = {**data, "schedule": {**PRESETS[name].schedule.to_dict(), **given}}
    return methods.from_dict(data)


def check_pools(app: AppConfig) -> None:
    """Raise ConfigError for a pool whose method cannot run on the model (a schedule for another depth, no
    proxies), and for one that another pool's engine cannot run, though requests may choose it there.

    Looks into the model's folder. Of a hub id, or a folder on other machines, only the engines can tell.
    """
    folder = Path(resolve_path(app.model))
    if not (folder / "config.json").is_file():
        return
    for index, pool in enumerate(app.pools):
        proxies = app.engines[pool.engine].proxies
        check_method(parse_method(pool.method), folder, proxies, where=f"pools.{index}.method")
    for name, engine in app.engines.items():
        for where, method in app.methods_on(name).items():
            try:
                check_method(parse_method(method), folder, engine.proxies, where=where)
            except ConfigError as error:
                raise ConfigError(
                    f"engines.{name} must run every method that a request may choose, got {where}, which it "
                    f"cannot: {error}, or leave it out of allowed_methods",
                    field=f"engines.{name}",
                ) from None


def check_method(method: Method, folder: Path, proxies: str | None = None, *, where: str = "method") -> None:
    """Raise ConfigError, naming `where`, for a method that cannot run on the model in a folder: a schedule
    for another depth, no proxies, or none for its first skipping layer.

    proxies: another folder than the model's own.
    """
    num_layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    try:
        schedule = method.schedule_for(num_layers)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", field=where) from None
    if not method.needs_proxies:
        return
    fitted = folder / "proxies" if proxies is None else Path(resolve_path(proxies))
    if not (fitted / "proxies.json").is_file():
        raise ConfigError(
            f"{where}.name must not need proxies on a model without them, got {method.name!r} and no "
            f"proxies in {fitted}; fit them with python -m jobs.calibrate",
            field=where,
        )
    first = json.loads((fitted / "proxies.json").read_text(encoding="utf-8"))["first_layer"]
    if schedule.stages and schedule.first_skip_layer < first:
        raise ConfigError(
            f"{where}.schedule.first_skip_layer must be at least {first}, the first layer with a proxy "
            f"in {fitted}, got {schedule.first_skip_layer}; skip later, or fit proxies with "
            "python -m jobs.calibrate --first-layer",
            field=where,
        )


def resolve_path(path: str) -> str:
    """An absolute path for a folder that exists in the working directory or beside the packages, else `path`
    itself (a hub id). Workers of a Ray cluster have working directories of their own."""
    for base in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if os.path.isdir(base / path):  # Path's own raises for a name that is too long
            return str((base / path).resolve())
    return path


def check_ray_config(path: str | Path) -> AppConfig:
    """Check a whole ray_config.yaml: our `args`, and Serve's blocks, whose unknown keys Serve itself lets
    pass.

    Raises ConfigError naming the key. Returns the one application's `args`.
    """
    from ray.serve.schema import ServeDeploySchema

    data = read_yaml(path)
    refuse_unknown_keys(data, ServeDeploySchema, str(path))
    try:
        deploy = ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(explain(dict(fault)) for fault in error.errors())) from None
    if len(deploy.applications) != 1:
        raise ConfigError(
            f"{path}: applications must hold one application, got {len(deploy.applications)}; remove the "
            "others",
            field="applications",
        )
    source = f"{path}: applications.0.args"
    app = parse(deploy.applications[0].args, AppConfig, source=source)
    try:
        check_pools(app)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", field=error.field) from None
    return app


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cluster.config ray_config.yaml")
    try:
        app = check_ray_config(sys.argv[1])
    except ConfigError as error:
        sys.exit(str(error))
    print(
        f"{sys.argv[1]} is valid: {app.model_name} on {len(app.engines)} engine(s), {len(app.pools)} pool(s)"
    )
