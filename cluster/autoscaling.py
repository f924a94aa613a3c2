"""How many replicas an engine should have, by the prompt tokens that wait to be read.

Serve's controller calls this. It may run where this package is not: Serve sends the class there by value, so
it uses the standard library only.
"""

from __future__ import annotations

from typing import Any

# What `cluster.app.EngineDeployment.record_autoscaling_stats` reports, by this name.
QUEUED_PREFILL_TOKENS = "queued_prefill_tokens"


class QueuedPrefillPolicy:
    """A policy for `ray.serve.config.AutoscalingPolicy`: one replica for every `tokens_per_replica` tokens of
    prompts whose prefill has not ended, over all replicas, as averaged by Serve.

    Serve rounds up, holds to the least and the most replicas, and waits for its delays.

    Worked example, tokens_per_replica = 1000: replicas that report 2500 and 300 want 2.8, which are 3; one
    that reports nothing yet, since it has just started, changes nothing.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The replicas wanted, and no state. context: `ray.serve.config.AutoscalingContext`."""
        by_replica = (context.aggregated_metrics or {}).get(QUEUED_PREFILL_TOKENS, {})
        return sum(by_replica.values()) / self._tokens_per_replica, {}
