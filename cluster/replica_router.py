"""The router that Serve asks which replica of an engine a call goes to.

Serve sends this module's content by value to whoever holds a handle; what it imports is found there by name.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.balance import Placement
from cluster.replicas import PlacedRequest, queued_by_others


class ReplicaRouter(FIFOMixin, RequestRouter):
    """Serve's request router for engines: a `PlacedRequest` goes where its placement says.

    One choice is made after the other, never two at once: nothing here waits, so that each sees those before
    it. Therefore also FIFOMixin, which gives a request the replica that was chosen for it: all calls of one
    HTTP request have the same id, by which Serve would otherwise match them.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, best first. Other calls than a `PlacedRequest` go to any."""
        for replica in candidate_replicas:
            # What an engine has to do is the placement's affair. Serve's own count of calls would be asked
            # for over the network when it is old, and others would choose meanwhile.
            if self.replica_queue_len_cache.get(replica.replica_id) is None:
                self.on_new_queue_len_info(replica.replica_id, 0)
        placement = _placement(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if placement is None:
            return [candidate_replicas]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        reports = {name: replica.routing_stats for name, replica in by_id.items()}
        ranked = placement.rank({n: queued_by_others(r, placement.router_id) for n, r in reports.items()})
        return [[by_id[name]] for name in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve sent it, nearly always where it was to go."""
        placement = _placement(pending_request)
        if placement is not None:
            placement.move(replica_id.unique_id)


def _placement(pending_request: PendingRequest | None) -> Placement | None:
    args = () if pending_request is None else pending_request.args
    return next((arg.placement for arg in args if isinstance(arg, PlacedRequest)), None)
