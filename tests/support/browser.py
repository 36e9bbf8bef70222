"""A real browser that looks at a page: Chromium without a window, spoken to through two pipes, with what Python has.

It is the one of the machine (``CHROMIUM=/path`` names another): Debian's ``chromium-headless-shell`` is enough.

Authority: the Chrome DevTools Protocol, and its option ``--remote-debugging-pipe``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest

NAMES: Final = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

KEYS: Final = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
"""Of a key: its number, and the text that it makes."""

OPTIONS: Final = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One tab, and what was said of its pages.

    Attributes:
        said: what a developer would see in the console, errors of the page and what its policy forbade.
        requests: all addresses that were asked for.
    """

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._held, self._number, self._session = b"", 0, ""
        self.said: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = os.read(self._answers, 1 << 16)
            assert part, f"the browser ended: {self._process.wait()}"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        self._heard(found.get("method", ""), found.get("params", {}))
        return found

    def _heard(self, event: str, values: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded"):
            self.said.append(json.dumps(values))

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask for something, and wait for the answer."""
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._commands, json.dumps(asked).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        """Show a file in a window of so many pixels, light or dark, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._message()

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        number, text = KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser; where none is installed, or it is no POSIX system, the test is skipped."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or os.name != "posix":
        assert "UQFF_TEST_BROWSER" not in os.environ, "no Chromium: tests/README.md says where there is one"
        pytest.skip("no Chromium")
    (to_browser, commands), (answers, from_browser) = os.pipe(), os.pipe()
    # The browser takes 3 and 4; a shell of POSIX names no other number of two digits.
    script = f'exec "$0" "$@" 3</dev/fd/{to_browser} 4>/dev/fd/{from_browser} 2>/dev/null'
    with TemporaryDirectory() as profile:
        given = [*OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        with subprocess.Popen(
            ["/bin/sh", "-c", script, program, *given],
            pass_fds=(to_browser, from_browser),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        ) as process:
            os.close(to_browser)
            os.close(from_browser)
            try:
                yield Browser(process, commands, answers)
            finally:
                os.close(commands)  # it ends then
                os.close(answers)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
