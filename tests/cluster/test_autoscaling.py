"""How many replicas are wanted: the policy alone, and inside Serve's own bounds and delays."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling import QUEUED_PREFILL_TOKENS, QueuedPrefillPolicy

# Ray's own models use what pydantic deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Context:
    """What a policy reads of `ray.serve.config.AutoscalingContext`."""

    def __init__(self, metrics) -> None:
        self.aggregated_metrics = metrics


def wanted(queued, tokens_per_replica=1000):
    return QueuedPrefillPolicy(tokens_per_replica)(Context({QUEUED_PREFILL_TOKENS: queued}))


def test_the_worked_example():
    assert wanted({"a": 2500.0, "b": 300.0}) == (2.8, {})


@pytest.mark.parametrize("metrics", [None, {}, {"other": {"a": 5.0}}, {QUEUED_PREFILL_TOKENS: {}}])
def test_replicas_that_report_nothing_call_for_nothing(metrics):
    assert QueuedPrefillPolicy(1000)(Context(metrics)) == (0.0, {})


@given(
    queued=st.dictionaries(st.text(max_size=2), st.integers(0, 10**7), max_size=5),
    tokens_per_replica=st.integers(1, 10**6),
)
def test_enough_replicas_for_the_queue_and_not_one_more(queued, tokens_per_replica):
    replicas = math.ceil(wanted(queued, tokens_per_replica)[0])
    total = sum(queued.values())
    assert replicas * tokens_per_replica >= total
    assert max(0, replicas - 1) * tokens_per_replica < total or total == 0


def serve_context(config, *, queued, now, target=1, state=None):
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingContext

    return AutoscalingContext(
        deployment_id=DeploymentID(name="Engine-default", app_name="spts"),
        deployment_name="Engine-default",
        app_name="spts",
        current_num_replicas=target,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={QUEUED_PREFILL_TOKENS: queued},
        raw_metrics={},
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=config,
    )


def test_serve_takes_the_policy_as_configured_and_keeps_its_delays(monkeypatch):
    """Through Serve's own wrapper, as its controller calls it, from what `cluster.app` deploys."""
    from ray.serve import autoscaling_policy
    from ray.serve._private.autoscaling_state import _resolve_policy_callable

    from cluster.app import build

    app = build(
        {
            "engines": {
                "default": {
                    "model": "jobs/demo_model",
                    "replicas": 2,
                    "autoscaling": {"max_replicas": 6, "queued_prefill_tokens": 500, "upscale_delay_s": 7},
                }
            },
            "pools": [{"method": {"name": "dense"}}],
        }
    )
    [engine] = app._bound_deployment.init_args
    config = engine._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.look_back_period_s) == (2, 6, 30.0)
    clock = [100.0]
    monkeypatch.setattr(autoscaling_policy.time, "time", lambda: clock[0])
    policy = autoscaling_policy._apply_autoscaling_config(_resolve_policy_callable(config.policy))
    queued = {"a": 1200.0, "b": 301.0}
    replicas, state = policy(serve_context(config, queued=queued, now=clock[0], target=2))
    assert replicas == 2, "not before its delay"
    clock[0] += 7.5
    replicas, state = policy(serve_context(config, queued=queued, now=clock[0], target=2, state=state))
    assert replicas == 4, "1501 tokens at 500 a replica"


def test_the_policy_runs_where_this_package_is_not(tmp_path):
    """Serve's controller has no working directory of the application's."""
    import subprocess
    import sys

    from ray.serve.config import AutoscalingPolicy

    policy = AutoscalingPolicy(policy_function=QueuedPrefillPolicy, policy_kwargs={"tokens_per_replica": 10})
    (tmp_path / "policy").write_bytes(policy.get_serialized_policy_def())
    script = """
import pickle, sys, types
sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(lambda name, *_: (_ for _ in ()).throw(
    ImportError(name)) if name.split(".")[0] in ("cluster", "spts", "jobs") else None)}))
policy = pickle.loads(open("policy", "rb").read())(tokens_per_replica=10)
context = types.SimpleNamespace(aggregated_metrics={"queued_prefill_tokens": {"r": 25}})
print(policy(context))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "(2.5, {})", done.stderr
