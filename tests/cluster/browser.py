"""Headless Chromium over its DevTools protocol: open a page, ask it things, take its picture."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One tab. faults: what the page wrote to the console as an error or a warning, uncaught exceptions, and
    what the browser refused or could not load."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._last_id = 0
        self.faults: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._last_id:
                assert "error" not in message, message
                answer: dict[str, Any] = message["result"]
                return answer
            self._note(message)

    def show(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """The size of the window, and the colours that its user likes."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Load a page."""
        self.send("Page.navigate", url="about:blank")  # another hash alone would not load it anew
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 120) -> None:
        """Wait until a JavaScript expression holds."""
        deadline = time.monotonic() + timeout_s
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression} does not hold; the page: {self.text()}"
            time.sleep(0.1)

    def text(self) -> str:
        """What a reader sees of the page."""
        return str(self.value("document.body?.innerText ?? ''"))

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"]))
        elif message["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.faults.append(json.dumps(params["args"]))
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.faults.append(json.dumps(params["entry"]))


@contextmanager
def browser_tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser of its own. profile: an empty folder for it."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--disable-gpu", "--remote-debugging-port=0", "--mute-audio"]
    command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--force-device-scale-factor=1"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium's sandbox does not work for root
    log = profile.parent / "chromium.log"
    with log.open("wb") as output:
        browser = subprocess.Popen([*command, "about:blank"], stdout=output, stderr=output)
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.is_file() and len(port_file.read_text().splitlines()) == 2):
            assert browser.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
        tabs = httpx.get(f"{address}/json").json()
        url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(url, max_size=2**26) as socket:
            yield Tab(socket)
    finally:
        browser.terminate()
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
