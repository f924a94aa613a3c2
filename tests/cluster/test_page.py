"""The page at /, in a real browser, against a real `serve run` of the bundled model behind an API key.

Pictures of it are left in build/artefacts/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.cluster.browser import CHROMIUM, Tab, browser_tab
from tests.cluster.conftest import KEY, REPOSITORY
from tests.cluster.endpoint import endpoint

PICTURES = REPOSITORY / "build" / "artefacts"
SETTLED = "document.querySelector('#verdict:not([hidden]), #problem:not([hidden])') !== null"
# How strongly the picture's first and last layer are painted, 0 to 255: the mean along the middle of the row.
STRENGTHS = """(() => {
  const canvas = document.querySelector("#SIDE canvas"), pen = canvas.getContext("2d");
  const row = (canvas.height - BELOW) / 12, width = canvas.width - LEFT - RIGHT;
  return [0, 11].map((layer) => {
    const data = pen.getImageData(LEFT, Math.floor((layer + 0.5) * row), width, 1).data;
    return data.reduce((sum, value, i) => sum + (i % 4 === 3 ? value : 0), 0) / width;
  });
})()"""
# The lengths of the bars, dense and SPTS of each measure, in pixels, and what is written beside them.
BARS = """[...document.querySelectorAll("#verdict .bar")].map(
  (bar) => [bar.querySelector("i").getBoundingClientRect().width, bar.querySelector("b").textContent])"""

browsing = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


async def test_the_page_loads_nothing_from_elsewhere(folder):
    async with endpoint(folder) as (client, _):
        page = await client.get("")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for name, kind in (
            ("page.css", "text/css"),
            ("page.js", "text/javascript"),
            ("picture.js", "text/javascript"),
            ("icon.svg", "image/svg+xml"),
        ):
            assert f'"{name}"' in page.text
            file = await client.get(name)
            assert file.headers["content-type"].startswith(kind)
            assert file.headers["content-security-policy"].startswith("default-src 'self';")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        # Links a reader may follow aside.
        assert re.findall(r'(?:src|<link[^>]*href)="(\w+:|//)', page.text) == []


@pytest.fixture
def tab(tmp_path) -> Iterator[Tab]:
    with browser_tab(tmp_path / "profile") as tab:
        yield tab


def give_key(tab: Tab) -> None:
    """What a reader does who is asked for a key; nothing but its absence has gone wrong until then."""
    tab.wait("document.querySelector('#key-label:not([hidden])') !== null")
    tab.wait("document.body.innerText.includes(\"Authorization header must be 'Bearer KEY'\")")
    assert all("401" in fault for fault in tab.faults)
    tab.faults.clear()
    tab.value(f"$('key').value = '{KEY}'; $('key').dispatchEvent(new Event('change'))")
    tab.wait("$('problem').hidden")


class TestInABrowser:
    pytestmark = browsing

    @pytest.mark.parametrize(
        ("width", "dark"), [(1366, False), (390, False), (1366, True)], ids=["wide", "narrow", "dark"]
    )
    def test_the_example_is_answered_twice_and_drawn(self, demo_url, tab, width, dark):
        tab.show(width=width, dark=dark)
        tab.open(f"{demo_url}/#example")
        give_key(tab)
        tab.wait(SETTLED)
        tab.picture(PICTURES / f"page-{width}{'-dark' if dark else ''}.png")
        assert tab.faults == []
        assert tab.value("$('problem').textContent") == ""
        headline = tab.value("document.querySelector('#verdict h2').textContent")
        assert headline.startswith("The same answer; with SPTS the first token")
        bars = tab.value(BARS)
        assert len(bars) == 6
        for dense, skipping in zip(bars[::2], bars[1::2], strict=True):
            assert 0 < skipping[0] < dense[0] < width
        assert re.fullmatch(r"[\d.]+ m?s", bars[0][1])
        assert bars[2][1] == "100 %"
        assert re.fullmatch(r"[\d.]+ [KM]iB", bars[5][1])
        noun = tab.value(r"$('question').value.match(/code of (\w+)/)[1]")
        code = re.search(rf"The code of {noun} is (\w+)\.", tab.value("$('document').value"))
        assert code is not None
        [place] = tab.value(f"places('{code[1]}', $('document').value)")
        assert 0 <= place < 1
        for side in ("dense", "spts"):
            assert tab.value(f"document.querySelector('#{side} .answer').textContent").strip() == code[1]
            label = tab.value(f"document.querySelector('#{side} canvas').ariaLabel")
            assert label.split(": ")[1].startswith("100, 100, 100, 100, ")
            first, last = tab.value(STRENGTHS.replace("SIDE", side))
            assert first == 255, "every token runs the first layer"
            assert last == 255 if side == "dense" else 15 < last < 80, "and few the last one, with SPTS"
        assert tab.value("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"

    def test_faults_are_said_and_a_place_in_the_picture_can_be_read(self, demo_url, tab):
        tab.show(width=1366)
        tab.open(f"{demo_url}/")
        give_key(tab)
        tab.wait("$('problem').hidden")
        ask = "$('ask').requestSubmit()"
        tab.value(ask)
        assert "Write a question first." in tab.text()
        tab.value(f"$('document').value = 'fox '.repeat(9000); $('question').value = 'Which?'; {ask}")
        tab.wait("!$('problem').hidden && !$('run').disabled")
        assert "must be at most the context of 8448 tokens" in tab.text()
        assert "No answer." in tab.text()
        assert all("400" in fault for fault in tab.faults)
        tab.faults.clear()
        tab.value(
            f"$('document').value = 'The code of heron is cedar.'; $('question').value = 'Which?'; {ask}"
        )
        tab.wait("!$('verdict').hidden")
        asked = "The code of heron is cedar.\n\nQuestion: Which?"
        assert "shorter than every budget" in tab.text()
        box = "document.querySelector('#spts canvas').getBoundingClientRect()"
        tab.value(f"{box}.top > innerHeight && document.querySelector('#spts canvas').scrollIntoView()")
        x, y = tab.value(f"[{box}.left + {box}.width / 2, {box}.top + 20]")
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tab.wait("document.querySelector('#spts q') !== null")
        assert re.search(r"Layer \d+: 100 % of the tokens here ran attention", tab.text())
        assert tab.value("document.querySelector('#spts q').textContent") in asked
        tab.picture(PICTURES / "page-place.png")
        assert tab.value("places(' Fox', 'a fox '.repeat(4))") == [2 / 24, 8 / 24, 14 / 24, 20 / 24]
        assert tab.value("places('fox', 'fox '.repeat(1e6))") == [], "everywhere is nowhere, and found soon"
        assert tab.faults == []
