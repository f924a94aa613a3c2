"""The pages in a real browser, at the widths of a laptop and a phone. Screenshots go to build/artefacts/."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from jobs.reporting import wording
from tests.jobs.made_up import write_results

ARTEFACTS = Path(__file__).resolve().parents[2] / "build" / "artefacts"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>parent.hacked = 1</script><img src=x onerror='parent.hacked = 1'><b onclick=x>bold</b>"
WIDTHS = {"laptop": 1366, "phone": 390}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

# The page itself runs no script and forbids them: what looks into it is the page around it.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>
<pre id="found"></pre><script>
window.hacked = 0;
document.getElementById("page").onload = () => {{
  const doc = document.getElementById("page").contentDocument, root = doc.documentElement;
  const found = {{closed: root.scrollWidth}};
  const shown = (all) => [...doc.querySelectorAll(all)].filter((one) => one.checkVisibility()).length;
  doc.querySelectorAll("details").forEach((one) => {{ one.open = true; }});
  found.open = root.scrollWidth;
  found.text = doc.body.innerText;
  found.images = [...doc.images].map((one) => one.complete && one.naturalWidth > 0);
  found.tags = [...new Set([...doc.querySelectorAll("*")].map((one) => one.localName))];
  found.attributes = [...new Set([...doc.querySelectorAll("*")].flatMap((one) => one.getAttributeNames()))];
  found.samples = {{}};
  const select = doc.querySelector("select");
  for (const option of select ? select.options : []) {{
    select.value = option.value;
    found.samples[option.text] = shown("details.sample");
  }}
  found.hacked = window.hacked;
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the browser made of a page: measures of it, and what its console said."""

    found: dict[str, Any]
    console: list[str]


def browse(page: Path, width: int, folder: Path, screenshot: Path | None = None, height: int = 1000) -> Seen:
    """Opens a page in a frame of that width."""
    harness = folder / f"harness-{page.stem}-{width}.html"
    harness.write_text(HARNESS.format(page=page.resolve().as_uri(), width=width, height=height))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--window-size={width},{height}", "--virtual-time-budget=10000",
        f"--screenshot={screenshot}" if screenshot else "--dump-dom", harness.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    return Seen(found=json.loads(html.unescape(found.group(1))) if found else {}, console=console)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report of a small sweep with a malicious answer and a failure, and its comparison with another."""
    folder = tmp_path_factory.mktemp("results")
    what: dict[str, Any] = {
        "tasks": ("single", "multivalue", "twohop"),
        "lengths": (1024, 2048, 8192),
        "count": 6,
    }
    write_results(
        folder / "one",
        **what,
        answers={"spts/single-2048-0-3": EVIL},
        errors={"recency/twohop-1024-0-1": f"internal: {EVIL}"},
        answer_tokens={"dense": 20, "spts": 12},
        per_context=2,
        reuse=True,
    )
    write_results(folder / "other", **what, per_context=2, reuse=True, dtype="bfloat16")
    assert report.main([str(folder / "one")]) == 0
    assert report.main([str(folder / "other"), str(folder / "one")]) == 1
    return {"report": folder / "one" / "report.html", "compare": folder / "one" / "compare.html"}


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_fits_is_quiet_and_shows_answers_as_text(pages, name, device, tmp_path):
    width = WIDTHS[device]
    seen = browse(pages[name], width, tmp_path)
    assert seen.console == [], "nothing is blocked, missing or broken"
    assert seen.found["closed"] == width, "no sideways scrolling of the page itself"
    assert seen.found["open"] == width, "nor with everything unfolded"
    assert wording.visible(EVIL) in seen.found["text"]
    assert seen.found["hacked"] == 0
    assert "script" not in seen.found["tags"]
    assert not [name for name in seen.found["attributes"] if name.startswith("on")], "no event handlers"
    assert all(seen.found["images"])
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    picture = ARTEFACTS / f"{name}-{device}.png"
    picture.unlink(missing_ok=True)
    browse(pages[name], width, tmp_path, picture, height=5000 if device == "laptop" else 9000)
    assert picture.stat().st_size > 20_000


def test_samples_are_filtered_without_a_script(pages, tmp_path):
    samples = browse(pages["report"], 1366, tmp_path).found["samples"]
    assert samples["all questions"] == 3 * 3 * 6
    assert samples["a method failed"] == 1
    assert 0 < samples["recency below dense"] < samples["methods score differently"] < 3 * 3 * 6
