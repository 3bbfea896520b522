"""The web page in a real browser: upload, tiles, a streamed answer, two grids, mistakes, nothing from elsewhere.

Run with `tools/test --browser`, which installs what it takes. Screenshots go to SCREENSHOTS, if that is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anyres_vlm.geometry import Grid, Size, Tiling, count_tokens
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import Turn

pytestmark = pytest.mark.browser
SIZE = Size(height=90, width=400)
QUESTION = "What does the <b>sign</b> say?"
WAIT_S = int(os.environ.get("WAIT_S", 120))
WATCH_ANSWER = """
window.said = [];
new MutationObserver(() => {
    const answers = document.querySelectorAll(".bot.message");
    if (answers.length) window.said.push(answers[answers.length - 1].innerText);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    Image.linear_gradient("L").resize((SIZE.width, SIZE.height)).save(folder / "wide.png")
    Image.linear_gradient("L").resize((60, 80)).save(folder / "tall.png")
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:100] + b"<script>")
    (folder / "huge.png").write_bytes(bytes(1_200_000))
    return {path.stem: path for path in folder.iterdir()}


def command(checkpoint: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "anyres_vlm", "web", str(checkpoint), "--port", str(port), "--max-upload-mb", "1"]


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[tuple[str, int]]:
    """A running server; what it says when it ends is checked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(command(checkpoint, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith(f"serving on http://127.0.0.1:{port}/"), server.communicate()
    yield "127.0.0.1", port
    server.send_signal(signal.SIGINT)
    said = "".join(server.communicate(timeout=WAIT_S))
    assert "Traceback" not in said, said


class Page:
    """A browser's window with the page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        found = self.driver.find_elements("css selector", selector)
        return [element for element in found if element.tag_name == "input" or element.is_displayed()]

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException  # the extra `browser`
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]
        return WebDriverWait(self.driver, WAIT_S, 0.05, ignored).until(lambda _: condition())

    def one(self, selector: str) -> Any:
        return self.wait(lambda: self.all(selector))[0]

    def text(self, selector: str) -> str:
        return "\n".join(element.text for element in self.all(selector))

    def drop(self, *paths: Path) -> None:
        if self.all("#files button[aria-label='Clear']"):
            self.one("#files button[aria-label='Clear']").click()
            self.wait(lambda: not self.all("#files button[aria-label='Clear']"))
        self.one("input[type=file]").send_keys("\n".join(map(str, paths)))

    def tab(self, name: str) -> None:
        self.wait(lambda: [tab for tab in self.all("button[role=tab]") if tab.text == name])[0].click()

    def write(self, name: str, text: str) -> None:
        field = self.one(f"#{name} :is(textarea, input)")
        field.clear()
        field.send_keys(text)

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture
def page(address: tuple[str, int]) -> Iterator[Page]:
    """Afterwards, all that the browser asked for must have been asked of the server."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1300"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    home = f"http://{address[0]}:{address[1]}/"
    try:
        driver.get(home)
        opened = Page(driver)
        opened.wait(lambda: "Drop an image above" in opened.text(".anyres"))
        yield opened
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        assert len(asked) > 20
        assert [url[:80] for url in asked if not url.startswith((home, "data:", "blob:"))] == []
        assert [entry for entry in driver.get_log("browser") if "Content Security Policy" in entry["message"]] == []
    finally:
        opened.shoot("last")
        driver.quit()


def bill(grid: Grid, **options: Any) -> str:
    """The end of what the page says of `wide.png`."""
    return f"= {count_tokens(SIZE, Tiling.from_grid(grid, tile=28, patch=14, **options)):,} tokens"


def test_upload_question_streamed_answer_and_alternatives(page: Page, files: dict[str, Path], checkpoint: Path) -> None:
    page.drop(files["wide"])
    assert page.one(".anyres img").size["width"] > 300
    assert bill(Grid(2, 2)) in page.text(".bill")
    page.driver.execute_script(WATCH_ANSWER)
    page.write("question", QUESTION)
    page.one("#ask").click()
    page.wait(lambda: page.all("#alternatives table"))
    expected = Assistant.load(checkpoint).answer(
        [Turn("user", f"<image>\n{QUESTION}")], [Image.open(files["wide"]).convert("RGB")], Decoding(256)
    )
    assert len(expected.text) > 100, "an answer long enough to be seen coming"
    shown = page.text(".bot.message")
    assert re.findall(r"[!-~]", shown) == re.findall(r"[!-~]", expected.text)
    said = {text.strip() for text in page.driver.execute_script("return window.said")}
    assert len([text for text in said if text and shown.startswith(text)]) > 5, "the answer grew before one's eyes"
    assert page.text(".user.message").strip() == QUESTION, "shown as written, not as HTML"
    rows = page.all("#alternatives tr")
    assert expected.new_tokens <= len(rows) - 1 <= expected.new_tokens + 1
    assert rows[1].text.count("%") == 5
    page.shoot("chat")
    page.write("question", "And now?")
    page.one("#ask").click()
    page.wait(lambda: len(page.all(".user.message")) == 2)
    page.one("#begin").click()
    page.wait(lambda: not page.all(".user.message"))


def test_tiles_of_any_grid_in_both_dialects(page: Page, files: dict[str, Path]) -> None:
    page.drop(files["wide"], files["tall"])
    page.wait(lambda: len(page.all(".anyres img")) == 2)
    page.tab("Tiles")
    page.wait(lambda: bill(Grid(2, 2)) in page.text("#tiles"))
    page.write("grid", "3x4\n")
    page.wait(lambda: bill(Grid(3, 4)) in page.text("#tiles"))
    assert len(page.all("#tiles tr.chosen")) == 2
    page.shoot("tiles")
    page.one("#dialect input[value=llava]").find_element("xpath", "..").click()
    page.wait(lambda: bill(Grid(3, 4), dialect="llava") in page.text("#tiles"))
    page.write("grid", "3by4\n")
    page.wait(lambda: "grid '3by4': expected ROWSxCOLUMNS" in page.text(".toast-body"))


def test_grids_side_by_side(page: Page, files: dict[str, Path]) -> None:
    page.tab("Compare grids")
    page.write("compared", "what?")
    page.one("#compare").click()
    page.wait(lambda: "no image to compare" in page.text(".toast-body"))
    page.one(".toast-close").click()
    page.drop(files["wide"])
    page.wait(lambda: "wide" in page.text("#files"))
    page.one("#compare").click()
    page.wait(lambda: all(field.get_attribute("value") for field in page.all("[id^=answer] textarea")))
    bills = page.all(".bill")
    assert [grid in said.text for grid, said in zip((bill(Grid(1, 1)), bill(Grid(2, 2))), bills, strict=True)] == [
        True
    ] * 2
    page.shoot("compare")


def test_broken_and_large_files_are_plain_errors(page: Page, files: dict[str, Path]) -> None:
    page.drop(files["broken"])
    page.wait(lambda: "broken.png: broken image" in page.text(".anyres .error"))
    page.write("question", "what?")
    page.one("#ask").click()
    page.wait(lambda: "broken.png: broken image" in page.text(".toast-body"))
    page.shoot("broken")
    page.one(".toast-close").click()
    page.drop(files["huge"])
    page.wait(lambda: re.search("exceeds|too large|maximum", page.text(".toast-body")))
    page.shoot("huge")


def test_it_listens_here_alone_and_says_when_it_cannot(address: tuple[str, int], checkpoint: Path) -> None:
    others = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in others - {"127.0.0.1"}:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, address[1]), timeout=5)
    done = subprocess.run(command(checkpoint, address[1]), capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert f"error: cannot listen on 127.0.0.1 port {address[1]}: choose another" in done.stderr
