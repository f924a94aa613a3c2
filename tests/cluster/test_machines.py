"""Ranks and replicas on two machines: they find each other, one may be lost, and both must have the same
files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml

import spts
from tests.cluster.conftest import REPOSITORY
from tests.cluster.on_machines import PROMPT, methods
from tests.cluster.tiny import write_model
from tests.machines import ADDRESSES, Machines, machines

# Four questions at once, as soon as so many replicas run; prints the answers.
ASK = """
import concurrent.futures, httpx, json, sys, time
from ray import serve
def running():
    application = serve.status().applications.get("spts")
    engine = application and application.deployments.get("Engine-default")
    return engine.replica_states.get("RUNNING", 0) if engine else 0
while running() != int(sys.argv[1]):
    time.sleep(0.5)
prompt = "The code of falcon is amber.\\n\\nQuestion: What is the code of falcon?\\nAnswer:"
body = {"model": "spts-demo", "prompt": prompt, "max_tokens": 4, "temperature": 0}
def answer(_):
    answered = httpx.post("http://127.0.0.1:8000/v1/completions", json=body, timeout=120)
    return answered.json()["choices"][0]["text"]
with concurrent.futures.ThreadPoolExecutor() as pool:
    print(json.dumps(list(pool.map(answer, range(4)))))
"""
pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A folder that holds other weights on the second machine than on the first."""
    return write_model(tmp_path_factory.mktemp("other") / "tiny", seed=1)


@pytest.fixture(scope="module")
def two(tiny_model, other_model) -> Iterator[Machines]:
    with machines() as both:
        both.start(0)
        both.start(1, folders={other_model: tiny_model})
        yield both


def ask(two: Machines, *, replicas: int) -> list[str]:
    done = two.run("python", "-c", ASK, str(replicas))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ranks_refuse_other_files_on_the_other_machine(two, other_model):
    done = two.run("python", "-m", "tests.cluster.on_machines", str(other_model))
    [refused] = [json.loads(line)["refused"] for line in done.stdout.splitlines()] or [done.stderr]
    rule = r"model must be the same files on every machine, got others on 10\.77\.0\.[12]; copy them there"
    assert re.fullmatch(rule, refused)


def test_replicas_on_two_machines_and_on_the_one_that_is_left(two, tmp_path):
    config = yaml.safe_load((REPOSITORY / "ray_config.yaml").read_text())
    config["applications"][0]["args"]["engines"]["default"]["replicas"] = 2
    (tmp_path / "ray_config.yaml").write_text(yaml.safe_dump(config))
    deployed = two.run("serve", "deploy", str(tmp_path / "ray_config.yaml"))
    assert deployed.returncode == 0, deployed.stderr
    try:
        both = ask(two, replicas=2)
        two.lose(1)
        left = ask(two, replicas=1)
    finally:
        two.run("serve", "shutdown", "-y")
        two.start(1)
    assert [answer.split()[0] for answer in both + left] == ["amber"] * 8


def test_ranks_on_two_machines_answer_as_one_and_come_back(two, tiny_model):
    answer_and_come_back(two, tiny_model)


def test_gpus_of_two_machines_answer_as_one_and_come_back():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    # NCCL sees that it is one machine in truth, and must not make use of it.
    apart = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    envs = [{**apart, "CUDA_VISIBLE_DEVICES": str(index)} for index in range(2)]
    with machines() as two:
        for index, env in enumerate(envs):
            two.start(index, env=env)
        answer_and_come_back(two, REPOSITORY / "jobs" / "demo_model", device="cuda", env=envs[1])


def answer_and_come_back(
    two: Machines, model: Path, *, device: str = "cpu", env: Mapping[str, str] | None = None
) -> None:
    whole = spts.load(model, device=device)
    expected = [
        list(whole.generate(PROMPT, method, 8).token_ids) for method in methods(whole.shape.num_layers)
    ]
    driver = two.popen(
        0, sys.executable, "-m", "tests.cluster.on_machines", str(model), device,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert driver.stdout is not None and driver.stderr is not None
    try:
        # Ray prints there too, of the machine that it has lost.
        lines = (json.loads(line) for line in driver.stdout if line.startswith(b"{"))
        assert sorted(next(lines)["hosts"]) == sorted(ADDRESSES)
        assert next(lines) == {"answers": expected}
        assert next(lines) == {"streaming": True}
        two.lose(1)
        assert next(lines) == {"ended": "unavailable"}
        two.start(1, env=env)
        assert next(lines) == {"answers": expected}
    finally:
        driver.kill()
        print(driver.stderr.read().decode(errors="replace")[-4000:])
