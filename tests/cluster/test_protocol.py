"""What crosses actors survives the crossing."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from cluster.protocol import ERROR_KINDS, Chunk, EngineError, Request, Step
from spts.errors import RequestError
from spts.methods import Dense, Spts
from spts.sampling import Sampling
from tests.cluster.tiny import SCHEDULE


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_an_engine_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(EngineError(kind, "why", "max_tokens")))
    assert (error.kind, error.message, error.param, str(error)) == (kind, "why", "max_tokens", f"{kind}: why")


def test_an_unknown_error_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of invalid_request, .*, got 'oops'"):
        EngineError("oops", "why")  # type: ignore[arg-type]


def test_a_request_error_survives_pickling():
    error = RequestError("token_ids must …", code="empty_prompt", field="token_ids")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.field) == (str(error), "empty_prompt", "token_ids")


def test_requests_survive_pickling_equal():
    for method in (Dense(), Spts(schedule=SCHEDULE)):
        request = Request(
            request_id="a",
            token_ids=(1, 2, 3),
            method=method,
            max_new_tokens=4,
            sampling=Sampling(temperature=0.5, seed=7),
            deadline_s=2.0,
        )
        step = Step(release=("b",), start=request, advance=("a", 4), decode=(("c", 9),))
        assert pickle.loads(pickle.dumps(step)) == step
    chunk = Chunk(request_id="a", token_ids=(1,))
    assert pickle.loads(pickle.dumps(chunk)) == chunk


def test_protocol_placement_and_scheduler_need_neither_torch_nor_ray():
    code = (
        "import sys, cluster.protocol, cluster.placement, cluster.scheduler, cluster.admission;"
        "print(sorted({'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
