"""An endpoint to put under load: what `make serve` runs, on a cluster of its own and a free port.

    python -m jobs.load.served ray_config.yaml -- some-client --url {url}/v1 ...

runs another program's load on it: {url} in the command stands for its address. When the command ends, so does
the endpoint.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from cluster.config import AppConfig, check_ray_config, resolve_path
from cluster.local import HOST, free_ports, local_ray
from cluster.yaml_file import read_yaml
from spts.errors import ConfigError

READY_S = 300.0
STOP_S = 60.0


def changed_config(path: Path, changes: Sequence[str], *, port: int) -> dict[str, Any]:
    """A deployment file's content with other values, and on this port of the loopback address.

    changes: KEY=VALUE each, KEY below the application's `args`, dots between, VALUE as YAML:
    "engines.default.slice_tokens=null". Raises ConfigError for one that is not of this form; whether the
    outcome is valid is for `check_ray_config` to say.
    """
    data: Any = read_yaml(path)
    try:
        args = data["applications"][0]["args"]
    except (TypeError, KeyError, IndexError):
        raise ConfigError(
            f"serve must be a file like ray_config.yaml, got no applications.0.args in {path}; correct it",
            field="serve",
        ) from None
    for change in changes:
        key, equals, value = change.partition("=")
        *above, last = key.split(".")
        where = args
        for part in above:
            where = where.get(part) if isinstance(where, dict) else None
        if not equals or not isinstance(where, dict):
            raise ConfigError(
                f"set must be KEY=VALUE with a key below the application's args, got {change!r}; correct it",
                field="set",
            )
        where[last] = yaml.safe_load(value)
    data["http_options"] = {**(data.get("http_options") or {}), "host": HOST, "port": port}
    return dict(data)


@contextmanager
def served(path: Path, changes: Sequence[str] = ()) -> Iterator[tuple[str, AppConfig]]:
    """Starts the endpoint of a deployment file, gives its address and configuration when ready, ends it.

    changes: see `changed_config`. Raises ConfigError for a faulty configuration, RuntimeError when the
    endpoint does not come up, with the last lines of its log.
    """
    [port] = free_ports(1)
    content = changed_config(path, changes, port=port)
    with tempfile.TemporaryDirectory(prefix="spts-load-") as folder:
        file, log = Path(folder, path.name), Path(folder, "serve.log")
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        app = check_ray_config(file)
        with local_ray() as env:
            with log.open("wb") as output:
                child = subprocess.Popen(
                    [sys.executable, "-m", "ray.serve.scripts", "run", str(file)],
                    env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                )  # fmt: skip
            try:
                url = f"http://{HOST}:{port}"
                _wait_until_ready(f"{url}/ready", child, log)
                yield url, app
            finally:
                child.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_S)
                child.kill()
                child.wait()


def tokenizer_folder(app: AppConfig) -> str:
    """Where the tokenizer of a configured model is."""
    from spts.loading import resolve

    return str(resolve(resolve_path(app.model), weights=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command against an endpoint of its own; its exit status, 2 for a faulty configuration."""
    args = argparse.ArgumentParser(
        prog="python -m jobs.load.served",
        description="Run a command against an endpoint of its own, on the loopback address.",
    )
    args.add_argument("config", type=Path, help="a deployment file, as ray_config.yaml")
    args.add_argument("command", nargs="+", help="the command, after --; {url} is the endpoint's address")
    chosen = args.parse_args(argv)
    try:
        with served(chosen.config) as (url, _):
            return subprocess.run([part.replace("{url}", url) for part in chosen.command]).returncode
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _wait_until_ready(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while child.poll() is None and time.monotonic() < deadline:
        # An HTTP error is an OSError too: 404 and 503 until the engines have produced a token.
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    state = "did not become ready" if child.poll() is None else f"ended with {child.returncode}"
    text = log.read_text(encoding="utf-8", errors="replace")
    raise RuntimeError(f"the endpoint {state}; its last words:\n{text[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
