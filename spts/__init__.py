"""Self-Predictive Token Skipping (arXiv 2601.13155): faster prefill of long prompts, without training.

    model = spts.load("path/to/model")
    method = spts.methods.Spts(schedule=spts.Schedule.preset("llama-3.1-8b"))
    answer = model.generate(token_ids, method, max_new_tokens=16)

Names load when first used, so that `import spts` takes no time and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spts import methods
    from spts.errors import ConfigError, ModelError, ProxyError, RequestError, SptsError
    from spts.loading import load
    from spts.proxy import Proxies
    from spts.sampling import Sampling
    from spts.schedule import Schedule, Stage

__all__ = [
    "ConfigError",
    "ModelError",
    "Proxies",
    "ProxyError",
    "RequestError",
    "Sampling",
    "Schedule",
    "SptsError",
    "Stage",
    "load",
    "methods",
]

_MODULE_OF = {
    "ConfigError": "errors",
    "ModelError": "errors",
    "Proxies": "proxy",
    "ProxyError": "errors",
    "RequestError": "errors",
    "Sampling": "sampling",
    "Schedule": "schedule",
    "SptsError": "errors",
    "Stage": "schedule",
    "load": "loading",
    "methods": "methods",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = module if name == _MODULE_OF[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
