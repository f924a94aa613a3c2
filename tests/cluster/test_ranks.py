"""Real DeepSpeed ranks as real Ray actors: one or two choose the same tokens, give the same answers, and may
die."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio

import spts
from cluster.config import EngineConfig
from cluster.engine import Engine, start_engine, stop_engine
from cluster.group import RayGroup
from cluster.protocol import EngineError, Request
from cluster.shard import Shard
from spts.agreement import compare
from spts.methods import Dense, Random, Recency, Spts
from spts.sampling import Sampling
from spts.schedule import Schedule
from tests.cluster.tiny import NUM_LAYERS, SCHEDULE
from tests.cluster.tracing import TracingShard

METHODS = [Dense(), Spts(schedule=SCHEDULE), Random(schedule=SCHEDULE, seed=3), Recency(schedule=SCHEDULE)]
NAMES = [method.name for method in METHODS]
ABLATIONS = [
    Spts(schedule=SCHEDULE, probe_tokens=4, ffn_score="attention"),
    Spts(schedule=SCHEDULE, probe_tokens=64, ffn_score="dense"),
]
SPARSE = Spts(schedule=replace(SCHEDULE, attention_density=0.1))


@pytest.fixture(scope="module")
def whole(tiny_model):
    """The model in this process, unsharded and without DeepSpeed."""
    return spts.load(tiny_model)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(1, 298, length))


def request(request_id, token_ids, method, max_new_tokens=8, **fields) -> Request:
    return Request(
        request_id=request_id, token_ids=token_ids, method=method, max_new_tokens=max_new_tokens, **fields
    )


class Ranks:
    """An engine in this process on real ranks."""

    def __init__(self, model, world_size: int) -> None:
        self.config = EngineConfig(model=str(model), tensor_parallel_size=world_size, slice_tokens=64)
        self.group = RayGroup(self.config, TracingShard)
        self.engine = Engine(self.config, self.group)

    def ask(self, method: str, *args):
        """The same call on every rank."""
        import ray

        return ray.get([getattr(rank, method).remote(*args) for rank in self.group._ranks])


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
async def ranks(request, driver, tiny_model):
    started = Ranks(tiny_model, request.param)
    await started.engine.start()
    yield started
    await started.engine.shutdown()


pytestmark = [pytest.mark.slow, pytest.mark.real]
in_module_loop = pytest.mark.asyncio(loop_scope="module")


@in_module_loop
async def test_one_rank_builds_no_process_group_and_nobody_compiles(ranks):
    world_size = ranks.config.tensor_parallel_size
    for facts in ranks.ask("facts"):
        assert facts == {
            "process_group": world_size > 1,
            "compiled_ops": [],
            "q_rows": 64 // world_size,
            "linear": "Linear" if world_size == 1 else "LinearAllreduce",
            "threads": 1,
        }


@in_module_loop
@pytest.mark.parametrize(
    "method", [*METHODS, *ABLATIONS, SPARSE], ids=[*NAMES, "spts-4-attention", "spts-64-dense", "sparse"]
)
@pytest.mark.parametrize("length", [1, 63, 100, 500])
async def test_ranks_choose_the_same_tokens_at_every_layer_and_agree_in_logits(ranks, whole, method, length):
    token_ids = prompt(length, seed=length)
    expected = whole.prefill(token_ids, method, trace=True)
    for answer in ranks.ask("trace", token_ids, method):
        assert len(answer["layers"]) == NUM_LAYERS
        for got, want in zip(answer["layers"], expected.trace, strict=True):
            assert got["candidates"] == want.candidates.tolist()
            assert got["attention"] == want.attention_tokens.tolist()
            assert got["ffn"] == want.ffn_tokens.tolist()
        np.testing.assert_allclose(answer["logits"], expected.logits.numpy(), atol=2e-5, rtol=2e-5)


@in_module_loop
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
async def test_an_answer_and_its_counts_are_those_of_the_library(ranks, whole, method):
    token_ids = prompt(120, seed=5)
    expected = whole.generate(token_ids, method, 24)
    result = await ranks.engine.run(request("a", token_ids, method, 24))
    assert list(result.token_ids) == expected.token_ids
    assert list(result.work) == expected.prefill.work
    assert result.kv_tokens == sum(work.attention_tokens for work in expected.prefill.work)
    assert result.kv_bytes == spts.cost.kv_bytes(whole.shape, expected.prefill.work, 4)
    assert result.dense_kv_bytes == 120 * NUM_LAYERS * 2 * 2 * 16 * 4
    assert (result.flops < result.dense_flops) == (method.name != "dense")


@in_module_loop
async def test_a_batch_of_several_requests_equals_each_alone(ranks, whole):
    sent = [
        request(f"r{i}", prompt(length, seed=i), METHODS[i % 4], 5 + 3 * i)
        for i, length in enumerate([3, 200, 63, 90, 41, 120])
    ]
    together = await asyncio.gather(*(ranks.engine.run(each) for each in sent))
    for each, result in zip(sent, together, strict=True):
        alone = whole.generate(each.token_ids, each.method, each.max_new_tokens)
        assert list(result.token_ids) == alone.token_ids


@in_module_loop
async def test_seeded_sampling_and_logprobs_are_those_of_the_library(ranks, whole):
    token_ids = prompt(80, seed=9)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=17, logprobs=3)
    expected = whole.generate(token_ids, METHODS[1], 12, sampling)
    result = await ranks.engine.run(request("a", token_ids, METHODS[1], 12, sampling=sampling))
    assert list(result.token_ids) == expected.token_ids
    assert result.logprobs is not None
    for got, want in zip(result.logprobs, expected.logprobs, strict=True):
        assert (got.token_id, [token for token, _ in got.top]) == (
            want.token_id,
            [token for token, _ in want.top],
        )
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)


@in_module_loop
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
async def test_followed_tokens_are_compared_with_the_dense_model(ranks, whole, method):
    token_ids, follow = prompt(110, seed=8), (5, 0, 17, 200, 9)
    sent = [request(name, token_ids, method, 5, follow=follow, prefix_tokens=0) for name in ("miss", "hit")]
    busy = asyncio.create_task(ranks.engine.run(request("busy", prompt(60, seed=3), METHODS[1], 40)))
    miss, hit = [await ranks.engine.run(each) for each in sent]
    assert (miss.token_ids, miss.finish_reason) == (follow, "length")
    assert miss.agreement == hit.agreement
    kl, rank = compare(whole.follow(token_ids, follow, Dense()), whole.follow(token_ids, follow, method))
    assert [each.rank for each in miss.agreement] == rank.tolist()
    assert [each.kl for each in miss.agreement] == pytest.approx(kl.tolist(), abs=1e-6)
    if method.name == "dense":
        assert all((each.kl, each.rank) == (0.0, 1) for each in miss.agreement)
    else:
        assert max(each.kl for each in miss.agreement) > 1e-3
    assert list((await busy).token_ids) == whole.generate(prompt(60, seed=3), METHODS[1], 40).token_ids


@in_module_loop
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
async def test_requests_that_begin_alike_compute_their_beginning_once(ranks, whole, method):
    shared = prompt(140, seed=11)
    sent = [
        request(f"r{i}", (*shared, *prompt(5 + 20 * i, seed=i)), method, 12, prefix_tokens=140)
        for i in range(4)
    ]
    busy = asyncio.create_task(ranks.engine.run(request("busy", prompt(60, seed=3), METHODS[1], 60)))
    first = await ranks.engine.run(sent[0])
    rest = await asyncio.gather(*(ranks.engine.run(each) for each in sent[1:]))
    depth = method.schedule_for(NUM_LAYERS).first_skip_layer
    # Methods that share a schedule share prefixes: the first of them has paid already.
    assert first.reused_tokens in ((0,) if method.name in ("dense", "spts") else (0, 140))
    for each, result in zip(sent, [first, *rest], strict=True):
        alone = whole.generate(each.token_ids, method, 12)
        assert list(result.token_ids) == alone.token_ids
        assert list(result.work) == alone.prefill.work
        assert result.kv_bytes == spts.cost.kv_bytes(whole.shape, alone.prefill.work, 4)
        assert result.reused_flops == spts.cost.reused_flops(whole.shape, result.reused_tokens, depth)
    assert [result.reused_tokens for result in rest] == [140] * 3
    assert list((await busy).token_ids) == whole.generate(prompt(60, seed=3), METHODS[1], 60).token_ids


@in_module_loop
@pytest.mark.parametrize("method", METHODS[:2], ids=NAMES[:2])
async def test_fifty_prompts_sent_at_once_are_answered_as_the_library_answers_each(ranks, whole, method):
    """Mixed lengths, some of which begin alike: none is told to share, all come and go between steps."""
    draw = np.random.default_rng(20)
    document = prompt(300, seed=21)
    sent = []
    for number in range(50):
        length = int(draw.choice([1, 2, 30, 63, 64, 65, 128, 200, 411]))
        shared = int(draw.choice([0, 0, 63, 64, 100, 128, 300]))
        token_ids = (*document[: min(shared, length)], *prompt(max(1, length - shared), seed=number))
        sent.append(request(f"r{number}", token_ids, method, int(draw.integers(1, 16))))
    results = await asyncio.gather(*(ranks.engine.run(each) for each in sent))
    for each, result in zip(sent, results, strict=True):
        alone = whole.generate(each.token_ids, method, each.max_new_tokens)
        assert list(result.token_ids) == alone.token_ids, each
        assert list(result.work) == alone.prefill.work
    assert sum(result.reused_tokens > 0 for result in results) > 5
    stats = await ranks.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_bytes, stats.reserved_bytes) == (0, 0, 0, 0)
    async with asyncio.timeout(10):  # until the ranks have heard of the last one's end
        while (await ranks.engine.stats()).held_requests:
            await asyncio.sleep(0.01)
    assert (await ranks.engine.stats()).held_documents == len(ranks.engine._scheduler._documents._kept)


@in_module_loop
@pytest.mark.parametrize("method", METHODS[:2], ids=NAMES[:2])
async def test_the_next_question_on_a_document_is_answered_as_without_it(ranks, whole, method):
    document = prompt(330, seed=31 + METHODS.index(method))
    depth = method.schedule_for(NUM_LAYERS).first_skip_layer
    for number, shared in enumerate([330, 330, 64, 65, 127, 329, 63]):
        token_ids = (*document[:shared], *prompt(20 + number, seed=50 + number))
        result = await ranks.engine.run(request("a", token_ids, method, 10))
        alone = whole.generate(token_ids, method, 10)
        assert list(result.token_ids) == alone.token_ids
        assert list(result.work) == alone.prefill.work
        assert result.reused_tokens == (0 if number == 0 or shared < 64 else shared)
        assert result.reused_flops == spts.cost.reused_flops(whole.shape, result.reused_tokens, depth)


@in_module_loop
async def test_where_attention_is_sparse_a_question_on_a_document_is_answered_as_without_it(ranks, whole):
    """Blocks of 128: what is reused ends with one, and a document of another density is not."""
    document = prompt(470, seed=77)
    for number, (method, shared, reused) in enumerate(
        [(METHODS[1], 400, 0), (SPARSE, 470, 0), (SPARSE, 470, 384), (SPARSE, 300, 256), (SPARSE, 100, 0)]
    ):
        token_ids = (*document[:shared], *prompt(20 + number, seed=90 + number))
        result = await ranks.engine.run(request("a", token_ids, method, 10))
        alone = whole.generate(token_ids, method, 10)
        assert list(result.token_ids) == alone.token_ids
        assert list(result.work) == alone.prefill.work
        assert result.reused_tokens == reused
        assert result.reused_flops == spts.cost.reused_flops(whole.shape, reused, 2, 0.1 if reused else 1.0)
    given = request("a", (*document[:300], *prompt(9, seed=7)), SPARSE, 10, prefix_tokens=300)
    assert (await ranks.engine.run(given)).reused_tokens == 256


@in_module_loop
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
async def test_ranks_choose_the_same_tokens_on_a_prefix_as_without(ranks, whole, method):
    token_ids = prompt(200, seed=12)
    expected = whole.prefill(token_ids, method, trace=True)
    for answer in ranks.ask("trace", token_ids, method, 150):
        assert answer["reused_tokens"] == 150
        for got, want in zip(answer["layers"], expected.trace, strict=True):
            assert got["candidates"] == want.candidates.tolist()
            assert got["attention"] == want.attention_tokens.tolist()
            assert got["ffn"] == want.ffn_tokens.tolist()
        np.testing.assert_allclose(answer["logits"], expected.logits.numpy(), atol=2e-5, rtol=2e-5)


@in_module_loop
async def test_a_method_that_lacks_its_proxies_is_refused_alone(ranks, whole, monkeypatch):
    """By the ranks too, whatever the engine believes of their proxies."""
    info = await ranks.engine.info()
    assert info.first_proxy_layer == 2
    monkeypatch.setattr(ranks.engine, "_info", replace(info, first_proxy_layer=0))
    early = Schedule(num_layers=NUM_LAYERS, first_skip_layer=1, stages=SCHEDULE.stages)
    token_ids = prompt(90, seed=6)
    good = asyncio.create_task(ranks.engine.run(request("good", token_ids, METHODS[1], 30)))
    with pytest.raises(EngineError, match=r"cover layers 1 to 1 .*got none; fit them") as refused:
        await ranks.engine.run(request("bad", token_ids, Spts(schedule=early)))
    assert (refused.value.kind, refused.value.param) == ("invalid_request", "proxies")
    assert list((await good).token_ids) == whole.generate(token_ids, METHODS[1], 30).token_ids
    assert (await ranks.engine.run(request("bad", token_ids, METHODS[1], 1))).finish_reason == "length"


@in_module_loop
async def test_a_rank_that_hangs_is_replaced(ranks, monkeypatch):
    restarts = (await ranks.engine.stats()).restarts
    monkeypatch.setattr(ranks.group, "_config", ranks.config.model_copy(update={"step_timeout_s": 1.0}))
    ranks.group._ranks[-1].hang.remote()
    with pytest.raises(EngineError, match="a rank did not answer within 1 s") as hung:
        await ranks.engine.run(request("a", prompt(50, seed=1), METHODS[0]))
    assert hung.value.kind == "unavailable"
    monkeypatch.undo()
    await ready(ranks.engine)
    assert (await ranks.engine.stats()).restarts == restarts + 1
    assert (await ranks.engine.run(request("b", prompt(50, seed=1), METHODS[0]))).finish_reason == "length"


@in_module_loop
async def test_a_killed_rank_fails_its_requests_at_once_and_the_group_restarts(ranks, whole):
    for victim in range(ranks.config.tensor_parallel_size):
        restarts = (await ranks.engine.stats()).restarts
        pids = ranks.ask("pid")
        stream = ranks.engine.generate(request("a", prompt(100, seed=1), METHODS[1], 400))
        await anext(stream)
        os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(EngineError) as died:
            await asyncio.wait_for(drain(stream), 30)
        assert died.value.kind == "unavailable"
        await ready(ranks.engine)
        assert (await ranks.engine.stats()).restarts == restarts + 1
        assert not set(pids) & set(ranks.ask("pid"))
        token_ids = prompt(70, seed=2)
        result = await ranks.engine.run(request("b", token_ids, METHODS[1]))
        assert list(result.token_ids) == whole.generate(token_ids, METHODS[1], 8).token_ids


async def ready(engine: Engine) -> None:
    async with asyncio.timeout(120):
        while not await engine.ready():
            await asyncio.sleep(0.1)


async def drain(stream) -> None:
    async for _ in stream:
        pass


def test_an_engine_as_a_ray_actor_for_jobs(driver, tiny_model, whole):
    engine = start_engine(EngineConfig(model=str(tiny_model)))
    try:
        info = driver.get(engine.info.remote())
        assert (info.fingerprint, info.shape, info.world_size) == (whole.fingerprint, whole.shape, 1)
        assert info.has_proxies
        assert set(info.versions) == {"python", "torch", "deepspeed", "transformers", "ray"}
        assert (info.attention, info.accelerator) == ("torch scaled_dot_product_attention", None)
        token_ids = prompt(90, seed=4)
        result = driver.get(engine.run.remote(request("a", token_ids, METHODS[1])))
        assert list(result.token_ids) == whole.generate(token_ids, METHODS[1], 8).token_ids
        chunks = [driver.get(ref) for ref in engine.generate.remote(request("b", token_ids, METHODS[0]))]
        assert len(chunks) == 8
        with pytest.raises(EngineError, match=r"context of 512 tokens, got 90 \+ 500"):
            driver.get(engine.run.remote(request("c", token_ids, METHODS[0], 500)))
    finally:
        stop_engine(engine)
    stop_engine(engine)


def test_an_engine_that_is_killed_leaves_its_place_to_another(driver, tiny_model):
    engine = start_engine(EngineConfig(model=str(tiny_model)))
    before = free_cpus(driver)
    driver.kill(engine)
    stop_engine(engine)
    wait_for_cpus(driver, before + 1)


def test_a_start_that_is_interrupted_leaves_its_place_to_another(driver, tiny_model, monkeypatch):
    before, get = free_cpus(driver), driver.get

    def interrupted(refs, **options):
        monkeypatch.setattr(driver, "get", get)
        wait_for_cpus(driver, before - 1)  # the ranks have their place, and load
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_engine(EngineConfig(model=str(tiny_model)), name="interrupted")
    wait_for_cpus(driver, before)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        driver.get_actor("interrupted")


def free_cpus(driver) -> float:
    return driver.available_resources().get("CPU", 0)


def wait_for_cpus(driver, num_cpus: float) -> None:
    for _ in range(100):
        if free_cpus(driver) == num_cpus:
            return
        time.sleep(0.1)
    pytest.fail(f"{num_cpus} CPU must be free, got {free_cpus(driver)}; is an engine left?")


def test_more_ranks_than_the_cluster_has_room_for_are_refused_at_once(driver, tiny_model):
    with pytest.raises(spts.ConfigError, match="got 18 CPU for 2 ranks; use fewer"):
        start_engine(EngineConfig(model=str(tiny_model), tensor_parallel_size=2, num_threads=9))


class Refused:
    """Faults that a rank finds before it reads a weight; no cluster is needed to see them."""

    @staticmethod
    def load(**config):
        return Shard(EngineConfig(**config), 0).load(("127.0.0.1", 0))


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_heads_that_ranks_cannot_share_are_refused_before_the_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(spts.ConfigError, match="num_key_value_heads = 2, got 4; use one of 1, 2"):
        Refused.load(model=str(folder), tensor_parallel_size=4)


def test_a_context_longer_than_the_models_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(spts.ConfigError, match=r"max_model_len must be at most .* 512 tokens, got 513"):
        Refused.load(model=str(folder), max_model_len=513)


def test_a_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(spts.ModelError, match=r"model must hold \*.safetensors, got none"):
        Refused.load(model=str(folder))


def test_an_unsupported_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(spts.ModelError, match=r"architectures must be one of .*GPT2LMHeadModel"):
        Refused.load(model=str(folder))


def test_foreign_and_missing_proxies_are_refused(folder, tmp_path):
    manifest = json.loads((folder / "proxies" / "proxies.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (folder / "proxies" / "proxies.json").write_text(json.dumps(manifest))
    with pytest.raises(spts.ProxyError, match="proxies must belong to the model with fingerprint"):
        Refused.load(model=str(folder))
    with pytest.raises(spts.ProxyError, match=r"proxies must be a folder with proxies.json"):
        Refused.load(model=str(folder), proxies=str(tmp_path / "none"))
