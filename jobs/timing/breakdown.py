"""Where the time of a prefill goes: every operation of every layer between two marks.

The marks are events on a GPU's stream, so nothing waits for the host; on a CPU the clock. They cost a little:
the sum is some percent above an unmarked prefill.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from jobs.timing.rounds import Part
from spts.kernels import dispatch
from spts.model import SptsModel
from spts.schedule import Schedule

_OPERATIONS = {
    "rms_norm": "norms",
    "rotate_in_place": "rotation",
    "last_query_probe": "probe",
    "last_queries_probe": "probe",
    "causal_attention": "attention",
    "sparse_attention": "attention",
    "top_rows": "select",
    "gather_rows": "gather",
    "add_rows_in_place": "scatter",
    "low_rank_norm": "proxy",
    "gated_product": "gated product",
}
_LINEARS = {
    "self_attn": {"q_proj": "q and o", "o_proj": "q and o", "k_proj": "k and v", "v_proj": "k and v"},
    "mlp": {"gate_proj": "gate and up", "up_proj": "gate and up", "down_proj": "down"},
}
_LAYER = "layer"


class Clock:
    """Marks around calls, by layer and kind of operation."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._layer = 0
        self._spans: dict[tuple[int, str], list[tuple[Any, Any]]] = defaultdict(list)

    def timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` between two marks."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = call(*args, **kwargs)
            self._spans[self._layer, kind].append((start, self._mark()))
            return result

        return run

    def timed_layer(self, index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's `call`, whose operations are counted as this layer's."""
        timed = self.timed(_LAYER, call)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._layer = index
            return timed(*args, **kwargs)

        return run

    def parts(self, method: str, length: int, schedule: Schedule) -> list[Part]:
        """What was marked, summed over the layers of each stage; waits for the device."""
        if self._gpu:
            torch.cuda.synchronize()
        ends = [schedule.first_skip_layer - 1, *(stage.last_layer for stage in schedule.stages)]
        ends.append(schedule.num_layers - 1)
        parts, first = [], 0
        for last in dict.fromkeys(ends):
            if last < first:
                continue
            seconds: dict[str, float] = defaultdict(float)
            calls: dict[str, int] = defaultdict(int)
            for (layer, kind), spans in self._spans.items():
                if first <= layer <= last:
                    seconds[kind] += sum(self._seconds(*span) for span in spans)
                    calls[kind] += len(spans)
            seconds["other"] = 2 * seconds[_LAYER] - sum(seconds.values())
            parts += [
                Part(
                    method=method,
                    length_tokens=length,
                    layers=f"{first}-{last}",
                    part=kind,
                    seconds=seconds[kind],
                    calls=calls[kind],
                )
                for kind in [*dict.fromkeys((*_OPERATIONS.values(), *_linear_kinds())), "other"]
                if kind in seconds
            ]
            first = last + 1
        return parts

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1e3 if self._gpu else stop - start


@contextmanager
def clocked(model: SptsModel) -> Iterator[Clock]:
    """Marks every operation of the model's layers within it."""
    clock = Clock(model.device)
    with ExitStack() as undo:
        for name, kind in _OPERATIONS.items():
            undo.enter_context(patch.object(dispatch, name, clock.timed(kind, getattr(dispatch, name))))
        for layer in model.layers:
            for block, linears in _LINEARS.items():
                for name, kind in linears.items():
                    linear = getattr(getattr(layer.block, block), name)
                    undo.enter_context(patch.object(linear, "forward", clock.timed(kind, linear.forward)))
            for way in ("dense", "prefill"):
                call = clock.timed_layer(layer.index, getattr(layer, way))
                undo.enter_context(patch.object(layer, way, call))
        yield clock


def _linear_kinds() -> Iterator[str]:
    for linears in _LINEARS.values():
        yield from linears.values()
