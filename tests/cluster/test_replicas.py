"""Two replicas of the bundled model behind real Serve: who gets what, what a lost one leaves, and how many
there are while prompts queue."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import yaml

from cluster.local import free_ports, local_ray
from tests.cluster.conftest import REPOSITORY, RayCluster, is_ready

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray uses what pydantic deprecates
]
LONG = 4000  # tokens; reading them takes this model seconds


class Endpoint:
    """An application of one engine, deployed again for other settings of it."""

    def __init__(self, ray_cluster: RayCluster, folder) -> None:
        self._ray = ray_cluster
        self._folder = folder
        self._port = free_ports(1)[0]
        self._random = random.Random(0)
        self.url = f"http://127.0.0.1:{self._port}"

    def deploy(self, **engine) -> None:
        config = yaml.safe_load((REPOSITORY / "ray_config.yaml").read_text())
        config["http_options"]["port"] = self._port
        args = config["applications"][0]["args"]
        args["engines"]["default"] |= engine
        args["pools"] = [{"method": {"name": "dense"}}]
        path = self._folder / "ray_config.yaml"
        path.write_text(yaml.safe_dump(config))
        self._ray.run("serve", "deploy", str(path), "--address", self._ray.env["RAY_API_SERVER_ADDRESS"])

    def prompt(self, num_tokens: int) -> list[int]:
        return self._random.choices(range(7, 5000), k=num_tokens)

    def ask(self, prompt: list[int], **fields) -> httpx.Response:
        body = {"model": "spts-demo", "prompt": prompt, "max_tokens": 2, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=180)

    def queued(self) -> float:
        return gauge(self.url, "spts:queued_prefill_tokens")

    def replicas(self) -> list[dict]:
        """Those of the engine that run, as Serve says; [] while there is nothing."""
        found = httpx.get(
            f"{self._ray.env['RAY_API_SERVER_ADDRESS']}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self._ray.env['RAY_AUTH_TOKEN']}"},
            timeout=30,
        ).json()
        deployments = found["applications"].get("spts", {}).get("deployments", {})
        every = deployments.get("Engine-default", {}).get("replicas", [])
        return [replica for replica in every if replica["state"] == "RUNNING"]

    def answered(self, pid: int) -> int:
        """Requests that the replica has answered, from its log."""
        [log] = {file.path for file in psutil.Process(pid).open_files() if "replica_spts_" in file.path}
        with open(log) as lines:
            messages = [json.loads(line)["message"] for line in lines]
        return sum(message.startswith("CALL generate") for message in messages)

    def where(self, send: Callable[[], object]) -> int:
        """The process of the one replica that answers what `send` asks."""
        before = {replica["pid"]: self.answered(replica["pid"]) for replica in self.replicas()}
        send()
        return wait(lambda: next((pid for pid, num in before.items() if self.answered(pid) > num), None), 5)


def gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return float(next(line for line in lines if line.startswith(name + "{")).rsplit(" ", 1)[1])


def wait(found: Callable[[], object], seconds: float):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        with local_ray(num_cpus=4) as env:
            endpoint = Endpoint(RayCluster(env), tmp_path_factory.mktemp("replicas"))
            endpoint.deploy(replicas=2)
            wait(lambda: is_ready(endpoint.url) and len(endpoint.replicas()) == 2, 240)
            yield endpoint


def test_prompts_go_where_fewer_tokens_wait(served):
    went = set()
    with ThreadPoolExecutor() as pool:
        long = pool.submit(served.ask, served.prompt(2 * LONG))
        wait(served.queued, 10)
        while True:
            pid = served.where(lambda: served.ask(served.prompt(20)))
            if served.queued() < 2 * LONG:  # what was answered may have been the long one
                break
            went.add(pid)
    assert long.result().status_code == 200
    assert len(went) == 1, "none waited behind the long one"


def test_a_second_question_goes_where_the_document_was_read(served):
    document = served.prompt(1000)
    reader = served.where(lambda: served.ask(document + served.prompt(30)))
    others = {served.where(lambda: served.ask(served.prompt(600))) for _ in range(2)}
    assert others == {replica["pid"] for replica in served.replicas()}, "they take turns when idle"
    assert [served.where(lambda: served.ask(document + served.prompt(30))) for _ in range(3)] == [reader] * 3


def test_choices_of_one_request_are_answered_each(served):
    """They share Serve's id of the request, and are spread all the same."""
    answer = served.ask(served.prompt(300), n=6)
    assert [choice["index"] for choice in answer.json()["choices"]] == [*range(6)]


def test_a_replica_that_hangs_hides_no_other(served):
    victim = served.replicas()[0]["pid"]
    os.kill(victim, signal.SIGSTOP)
    try:
        time.sleep(1.5)  # what /ready said before is too old by then
        assert is_ready(served.url)
        assert served.queued() == 0
    finally:
        os.kill(victim, signal.SIGCONT)


def test_a_replica_that_dies_loses_only_what_had_begun(served):
    ask = {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    document = served.prompt(1000)
    victim = served.where(lambda: served.ask(document))
    events: list[str] = []
    with ThreadPoolExecutor() as pool:
        body = {"model": "spts-demo", "prompt": [*document, 7], "temperature": 0, **ask}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=180) as begun:
            lines = begun.iter_lines()
            events.append(next(lines))
            waiting = pool.submit(served.ask, document + served.prompt(LONG))
            wait(served.queued, 10)
            os.kill(victim, signal.SIGKILL)
            events += [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "unavailable"
        assert waiting.result().status_code == 200, waiting.result().text
    assert served.ask(document).status_code == 200
    wait(lambda: len({replica["pid"] for replica in served.replicas()} - {victim}) == 2, 180)


def test_a_replica_whose_ranks_start_again_is_left_alone(served):
    document = served.prompt(1000)
    served.ask(document)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(served.ask, document + served.prompt(LONG))
        wait(served.queued, 10)
        os.kill(max(ranks(), key=lambda rank: rank.cpu_percent(interval=0.3)).pid, signal.SIGKILL)
        assert waiting.result().status_code == 200, "another replica read it"
    assert [served.ask(document).status_code for _ in range(5)] == [200] * 5


def test_a_question_whose_replica_is_full_goes_to_one_that_has_room(served):
    before = {replica["pid"] for replica in served.replicas()}
    served.deploy(replicas=2, max_running=1, max_waiting=0)
    wait(lambda: len({replica["pid"] for replica in served.replicas()} - before) == 2, 240)
    wait(lambda: is_ready(served.url) and before.isdisjoint(each["pid"] for each in served.replicas()), 240)
    document = served.prompt(1000)
    assert served.ask(document).status_code == 200
    lines = []  # kept: a client that drops them has left
    with contextlib.ExitStack() as streams:
        for place in range(2):  # an answer that goes on for long takes the place of the one that has read it
            body = {"model": "spts-demo", "prompt": [*document, 7 + place], "temperature": 0, "stream": True}
            body |= {"max_tokens": 6000, "ignore_eos": True}
            begun = streams.enter_context(
                httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=180)
            )
            assert begun.status_code == 200, begun.read()
            lines.append(begun.iter_lines())
            assert next(lines[-1])
        refused = served.ask([*document, 9])
        assert refused.status_code == 503, "now both are full"
        assert refused.json()["error"]["code"] == "overloaded"


def test_replicas_follow_the_queue(served):
    before = {replica["pid"] for replica in served.replicas()}  # full with one request, and still asked
    served.deploy(
        replicas=1,
        autoscaling={
            "max_replicas": 2,
            "queued_prefill_tokens": LONG,
            "upscale_delay_s": 1,
            "downscale_delay_s": 3,
            "look_back_period_s": 3,
        },
    )
    wait(lambda: len({replica["pid"] for replica in served.replicas()} - before) == 1, 240)
    wait(lambda: len(served.replicas()) == 1 and is_ready(served.url), 240)
    enough = threading.Event()

    def keep_asking() -> list[int]:
        codes = []
        while not enough.is_set():
            codes.append(served.ask(served.prompt(LONG)).status_code)
        return codes

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(keep_asking) for _ in range(6)]
        try:
            wait(lambda: len(served.replicas()) == 2, 240)
        finally:
            enough.set()
    assert {code for codes in asked for code in codes.result()} == {200}
    wait(lambda: len(served.replicas()) == 1, 120)
    assert served.ask(served.prompt(20)).status_code == 200


def ranks() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [each for each in below if each.cmdline() and each.cmdline()[0].startswith("ray::Shard")]
