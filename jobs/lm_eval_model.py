"""Our engines as a model of lm-evaluation-harness, so that its own `simple_evaluate` runs on the cluster:

    with ClusterLM(EngineConfig(model="jobs/demo_model"), method, engines=2) as model:
        results = lm_eval.simple_evaluate(model=model, tasks=["gsm8k"])

An answer is what a sweep gets for the same prompt, method and ending. Whatever lm-eval's other models do in
silence to a request that does not fit (cut off its beginning, give it fewer tokens) is an error here.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from cluster.config import EngineConfig, resolve_path
from cluster.protocol import EngineError, Request
from cluster.tokenizer import chat_template as template_of
from jobs import engines as pool
from jobs.sweeping.prompts import Prompts
from jobs.tasks.lm_eval_source import Generation, generation
from spts import loading
from spts.errors import config_error
from spts.methods import Method

ATTEMPTS = 3
# The engine keeps deadlines itself; this much later it is taken for one that does not answer at all.
_GRACE_S = 30.0
_ENGINE_FAULTS = ("unavailable", "overloaded", "internal")


class GenerationError(RuntimeError):
    """Some requests got no answer; every other one has been tried."""


class ChatPrompt(str):
    """A prompt that a chat template has rendered: it brings its special tokens, so none are added."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One of lm-eval's requests, understood. name: for errors."""

    instance: Any
    name: str
    token_ids: tuple[int, ...]
    ending: Generation


class ClusterLM(LM):
    """Engines with one model and one method. Starting it loads the model; use it in a `with`, or `close` it.

    Args:
        config: of each engine; max_model_len bounds prompt and answer together.
        method: how prompts are prefilled, with a schedule for this model.
        engines: how many, side by side. in_flight: requests at a time on each.
        timeout_s: per request and try; a request whose engine fails is tried again, three times in all.

    Raises:
        SptsError, EngineError: the engines did not start, the method does not suit the model.
    """

    def __init__(
        self,
        config: EngineConfig,
        method: Method,
        *,
        engines: int = 1,
        in_flight: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        self._method, self._in_flight, self._timeout_s = method, in_flight, timeout_s
        self._folder = loading.resolve(resolve_path(config.model))
        self._prompts = Prompts(self._folder)
        self._numbers = itertools.count()
        with ExitStack() as stack:
            # One loop for as long as the engines live: what they wait on belongs to it.
            self._loop = stack.enter_context(asyncio.Runner())
            stack.enter_context(pool.connected())
            pool.check_capacity(config, engines)
            self._engines, self.info = self._loop.run(pool.start_engines(config, engines))
            stack.callback(lambda: self._loop.run(pool.stop_engines(self._engines)))
            method.schedule_for(self.info.shape.num_layers)
            if method.needs_proxies and not self.info.has_proxies:
                remedy = "fit them with python -m jobs.calibrate"
                raise config_error("proxies", f"be there for method {method.name!r}", "none", remedy)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Stops the engines, and Ray if this started it."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers in the order of the requests, all engines busy until the last.

        Raises:
            ConfigError: before any is sent, if a request is not greedy, not text alone or too long.
            GenerationError: at the end, if some got no answer. lm-eval's `use_cache` keeps the others.
        """
        questions = [self._question(instance) for instance in requests]
        with tqdm(total=len(questions), disable=disable_tqdm, desc="generate_until") as bar:
            outcomes = self._loop.run(self._answer_all(questions, bar.update))
        failed = [
            f"{question.name}: {outcome}"
            for question, outcome in zip(questions, outcomes, strict=True)
            if isinstance(outcome, EngineError)
        ]
        if failed:
            raise GenerationError(
                f"all requests must be answered, got {len(failed)} of {len(questions)} without an answer "
                f"({'; '.join(failed[:5])}{'; ...' if failed[5:] else ''}); run again, with use_cache to "
                "keep the other answers"
            )
        return [str(outcome) for outcome in outcomes]

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Not there: engines generate, they give no probabilities of a prompt's own tokens."""
        raise NotImplementedError(
            "requests must be of type generate_until, got loglikelihood: a prefill that skips tokens has no "
            "probabilities of them; take the task's generating variant"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        """Not there, see `loglikelihood`."""
        self.loglikelihood(requests)

    @property
    def tokenizer_name(self) -> str:
        """Names model and files, for lm-eval's cache of rendered requests."""
        return f"{self.info.model_name}-{self.info.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the model's template, for lm-eval's records; None without one, or if it is not used."""
        if isinstance(chat_template, str):
            raise config_error(
                "apply_chat_template",
                "be true or false",
                repr(chat_template),
                "a model here has one template",
            )
        return template_of(self._folder) if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one prompt, up to where the assistant begins to speak.

        Raises RequestError when the model has no template or the template refuses, ConfigError when the
        assistant's answer has begun already (gen_prefix of a task).
        """
        if not add_generation_prompt:
            raise config_error(
                "apply_chat_template",
                "be off for a task with gen_prefix",
                "an answer that has begun",
                "turn it off or take another task",
            )
        return ChatPrompt(self._prompts.text.render_chat(chat_history))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the `config` of its results."""
        return {
            "model_name": self.info.model_name,
            "fingerprint": self.info.fingerprint,
            "method": self._method.to_dict(),
            "dtype": self.info.dtype,
            "max_length": self.info.max_context,
            "engines": len(self._engines),
        }

    def _question(self, instance: Instance) -> _Question:
        name = f"document {instance.doc_id} of {instance.task_name}"
        if len(instance.args) != 2:
            raise config_error(name, "be text alone", "images or audio with it", "take another task")
        prompt, kwargs = instance.args
        ending = generation(kwargs, where=f"generation_kwargs of {name}")
        encode = self._prompts.tokens.encode if isinstance(prompt, ChatPrompt) else self._prompts.text.encode
        token_ids = tuple(encode(prompt))
        if len(token_ids) + ending.max_new_tokens > self.info.max_context:
            raise config_error(
                name,
                f"fit with its answer into the model's context of {self.info.max_context} tokens",
                f"{len(token_ids)} + {ending.max_new_tokens}",
                "leave it out (samples=), or take fewer examples or a smaller max_gen_toks",
            )
        return _Question(instance=instance, name=name, token_ids=token_ids, ending=ending)

    async def _answer_all(
        self, questions: Sequence[_Question], on_answer: Callable[[], object]
    ) -> list[str | EngineError]:
        """Text or fault of each, the longest prompts first."""
        order = sorted(range(len(questions)), key=lambda index: -len(questions[index].token_ids))
        left = deque((index, 1) for index in order)
        outcomes: dict[int, str | EngineError] = {}
        alive = list(self._engines)

        async def lane(engine: pool.RayEngine) -> None:
            while left and engine in alive:
                index, attempt = left.popleft()
                outcome = await self._answer(engine, questions[index])
                at_fault = isinstance(outcome, EngineError) and outcome.kind in _ENGINE_FAULTS
                if at_fault and attempt < ATTEMPTS:
                    left.append((index, attempt + 1))
                else:
                    outcomes[index] = outcome
                    on_answer()
                if at_fault and not await engine.recover() and engine in alive:
                    alive.remove(engine)

        while left and alive:  # again: what a dying engine gave back after the other lanes had ended
            async with asyncio.TaskGroup() as group:
                for engine in alive * self._in_flight:
                    group.create_task(lane(engine))
        nobody = EngineError("unavailable", "no engine is left")
        return [outcomes.get(index, nobody) for index in range(len(questions))]

    async def _answer(self, engine: pool.RayEngine, question: _Question) -> str | EngineError:
        stop, prompts = question.ending.stop, self._prompts
        request = Request(
            request_id=f"lm-eval-{next(self._numbers)}",
            token_ids=question.token_ids,
            method=self._method,
            max_new_tokens=question.ending.max_new_tokens,
            sampling=prompts.sampling(stop),
            deadline_s=self._timeout_s,
        )
        patience_s = self._timeout_s + _GRACE_S
        try:
            until = prompts.stopping(stop) if stop else None
            result = await asyncio.wait_for(engine.run(request, until), patience_s)
        except TimeoutError:
            return EngineError("unavailable", f"the engine gave no sign within {patience_s:g} s")
        except EngineError as error:
            return error
        text = prompts.answer(result.token_ids, stop)
        self.cache_hook.add_partial("generate_until", question.instance.args, text)
        return text
