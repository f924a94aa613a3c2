"""Real Serve, deployed by its command line from a YAML file, and the `openai` client as it comes."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml

import spts
from cluster.config import check_ray_config
from cluster.local import free_ports
from spts.methods import Dense, Spts
from tests.cluster.conftest import REPOSITORY
from tests.cluster.tiny import SCHEDULE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray uses what pydantic deprecates
]
SKIPPING = Spts(schedule=SCHEDULE)


def deployment_file(folder, model, port, **args):
    path = folder / "ray_config.yaml"
    config = yaml.safe_load((REPOSITORY / "ray_config.yaml").read_text())
    config["http_options"]["port"] = port
    config["tracing_config"] = {"enabled": True, "sampling_ratio": 1.0}
    config["applications"][0]["args"] = {
        "served_model_name": "tiny",
        "engines": {
            "default": {
                "model": str(model),
                "tensor_parallel_size": 2,
                "slice_tokens": 64,
                "max_running": 2,
                "max_waiting": 0,
            }
        },
        "pools": [
            {"max_prompt_tokens": 60, "method": {"name": "dense"}},
            {"method": {"name": "spts", "schedule": SCHEDULE.to_dict()}},
        ],
        **args,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def deploy(ray_cluster, path) -> None:
    ray_cluster.run("serve", "deploy", str(path), "--address", ray_cluster.env["RAY_API_SERVER_ADDRESS"])


def wait_until_ready(client: httpx.Client, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:  # the proxy is not there yet
            pass
        time.sleep(0.2)
    pytest.fail("the endpoint did not become ready")


def rank_pids() -> set[int]:
    """The processes of all ranks below this one."""
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if process.cmdline() and process.cmdline()[0].startswith("ray::Shard")
    }


@pytest.fixture(scope="module")
def other_ranks(ray_cluster) -> set[int]:
    """Ranks that were there before the deployment: other tests may keep engines for the session."""
    return rank_pids()


@pytest.fixture(scope="module")
def http(ray_cluster, other_ranks, tiny_model, tmp_path_factory):
    """The endpoint on two real ranks."""
    port = free_ports(1)[0]
    path = deployment_file(tmp_path_factory.mktemp("serve"), tiny_model, port)
    check_ray_config(path)
    deploy(ray_cluster, path)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        wait_until_ready(client)
        yield client


@pytest.fixture(scope="module")
def sdk(http):
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def whole(tiny_model):
    return spts.load(tiny_model)


def prompt(length: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 298, length)]


def text_of(whole, tiny_model, token_ids) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(tiny_model).decode(token_ids, skip_special_tokens=True))


def test_the_shipped_file_is_valid():
    app = check_ray_config(REPOSITORY / "ray_config.yaml")
    assert app.model_name == "spts-demo"


@pytest.mark.parametrize("length", [10, 60, 61, 200])
def test_a_served_greedy_answer_is_the_librarys(sdk, whole, tiny_model, length):
    token_ids = prompt(length, seed=length)
    method = Dense() if length <= 60 else SKIPPING
    expected = whole.generate(token_ids, method, 20)
    answer = sdk.completions.create(
        model="tiny", prompt=token_ids, max_tokens=20, temperature=0, logprobs=1, stop=None
    )
    assert answer.choices[0].text == text_of(whole, tiny_model, expected.token_ids)
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert len(answer.choices[0].logprobs.tokens) == 20
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 20)
    extension = answer.usage.model_extra["spts"]
    assert extension["method"] == method.name
    assert extension["kv_tokens"] == sum(work.attention_tokens for work in expected.prefill.work)
    assert (extension["skipped_share"] > 0) == (method is SKIPPING)


def test_a_request_may_choose_its_method(sdk, whole, tiny_model):
    token_ids = prompt(200, seed=1)
    answer = sdk.completions.create(
        model="tiny",
        prompt=token_ids,
        max_tokens=12,
        temperature=0,
        extra_body={"spts": {"method": "dense"}},
    )
    assert answer.choices[0].text == text_of(
        whole, tiny_model, whole.generate(token_ids, Dense(), 12).token_ids
    )
    assert answer.usage.model_extra["spts"]["skipped_share"] == 0


def test_chat_whole_and_streamed_are_the_same(sdk):
    ask = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox?"}],
        "max_completion_tokens": 24,
        "seed": 5,
        "temperature": 0.7,
    }
    whole = sdk.chat.completions.create(**ask)
    *chunks, last = list(
        sdk.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_models_health_and_errors_through_the_client(sdk, http):
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").owned_by == "spts"
    assert http.get("/health").status_code == 200
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], presence_penalty=1.0
        )
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "presence_penalty")
    with pytest.raises(
        openai.BadRequestError, match=r"at most the context of 512 tokens, got 500 \+ 13"
    ) as long:
        sdk.completions.create(model="tiny", prompt=prompt(500, seed=0), max_tokens=13, stream=True)
    assert long.value.code == "context_length_exceeded"
    assert len(http.get("/health").headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_place(http, stream):
    body = {"model": "tiny", "prompt": prompt(60, seed=0), "max_tokens": 120, "temperature": 0, "n": 2}
    begun = time.monotonic()
    assert http.post("/v1/completions", json=body).status_code == 200
    full_s = time.monotonic() - begun
    if stream:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()  # kept: httpx closes the response with it
            next(lines)
            assert http.post("/v1/completions", json={**body, "n": 1}).status_code == 503
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=full_s / 5)
    left = time.monotonic()
    while http.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 503:
        time.sleep(0.01)
    assert time.monotonic() - left < full_s / 2


def test_a_killed_rank_is_said_in_the_stream_and_the_endpoint_comes_back(http, other_ranks):
    body = {
        "model": "tiny",
        "prompt": prompt(90, seed=0),
        "max_tokens": 400,
        "temperature": 0,
        "stream": True,
    }
    ranks = sorted(rank_pids() - other_ranks)
    assert len(ranks) == 2
    events: list[str] = []
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line and not events:
                os.kill(ranks[-1], signal.SIGKILL)
            events += [line.removeprefix("data: ")] if line else []
    assert json.loads(events[-1])["error"]["code"] == "unavailable"
    assert all(json.loads(event)["choices"][0]["finish_reason"] is None for event in events[:-1])
    refused = http.post("/v1/completions", json={**body, "stream": False, "max_tokens": 2})
    assert refused.status_code in (200, 503)
    assert http.get("/health").status_code == 200
    wait_until_ready(http)
    assert http.post("/v1/completions", json={**body, "stream": False, "max_tokens": 2}).status_code == 200


def test_logs_are_json_ours_among_them(http, driver):
    """After a rank was killed, which the engine says in its log."""
    folder = Path(driver._private.worker._global_node.get_logs_dir_path()) / "serve"
    [log] = folder.glob("replica_spts_Engine-default_*.log")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ours = [line for line in lines if line["message"].startswith("restarting the ranks")]
    assert ours
    assert ours[0]["levelname"] == "WARNING"
    assert ours[0]["deployment"] == "spts_Engine-default"


def test_a_traced_request_is_one_trace_from_the_client_to_the_engine(http, driver):
    """Serve's own setting, its spans written to files."""
    trace_id = secrets.token_hex(16)
    header = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    body = {"model": "tiny", "prompt": prompt(20, seed=0), "max_tokens": 2}
    assert http.post("/v1/completions", json=body, headers=header).status_code == 200
    folder = Path(driver._private.worker._global_node.get_logs_dir_path()) / "serve" / "spans"
    for replica, span in (
        ("Router", "POST /v1/completions"),
        ("Engine-default", "replica_handle_request Engine-default generate"),
    ):
        text = "".join(file.read_text() for file in folder.glob(f"replica_spts_{replica}_*"))
        names = {each["name"] for each in objects(text) if each["context"]["trace_id"] == f"0x{trace_id}"}
        assert span in names


def objects(text: str) -> list[dict]:
    """The JSON objects that a text consists of."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while (place := text.find("{", place)) >= 0:
        each, place = decoder.raw_decode(text, place)
        found.append(each)
    return found


def once_refused(http: httpx.Client, body: dict) -> httpx.Response:
    """The first answer that is not what was asked for."""
    deadline = time.monotonic() + 30
    while (answer := http.post("/v1/completions", json=body)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def test_what_has_begun_is_finished_before_the_endpoint_goes(http, driver, other_ranks):
    from ray import serve

    body = {"model": "tiny", "prompt": prompt(90, seed=0), "max_tokens": 400, "temperature": 0}
    gone: list[float] = []

    def delete() -> None:
        serve.delete("spts")
        gone.append(time.monotonic())

    deletion = threading.Thread(target=delete)
    events: list[str] = []
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line and not events:
                deletion.start()
                refused = once_refused(http, {**body, "max_tokens": 1})
            events += [line.removeprefix("data: ")] if line else []
    ended = time.monotonic()
    deletion.join(120)
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert gone
    assert gone[0] > ended
    for answer in (refused, http.post("/v1/completions", json=body)):
        # Of Serve's own proxy: it has no route to us any more.
        assert (answer.status_code, answer.headers["content-type"]) == (404, "text/plain; charset=utf-8")
    deadline = time.monotonic() + 60
    while rank_pids() != other_ranks:  # they end after their replica, and not at once on a busy machine
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_typo_in_args_fails_the_deployment_and_names_the_key(http, ray_cluster, tiny_model, tmp_path):
    path = deployment_file(tmp_path, tiny_model, http.base_url.port, engine={"model": "x"})
    deploy(ray_cluster, path)
    address = ("--address", ray_cluster.env["RAY_API_SERVER_ADDRESS"])
    for _ in range(100):
        status = ray_cluster.run("serve", "status", *address)
        if "DEPLOY_FAILED" in status:
            break
        time.sleep(0.3)
    assert "engine must be one of served_model_name, engines, pools" in " ".join(status.split())
