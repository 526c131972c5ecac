"""A real browser without a window: Debian's Chromium, asked through a pipe (DevTools protocol)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39}


def find_browser() -> str | None:
    """The browser of this machine, if it has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time; `requests` and `errors` are what it asked for and complained about."""

    def __init__(self, program: str, home: Path) -> None:
        first, self._out = os.pipe()
        self._in, second = os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={home}",
        ]  # fmt: skip
        # The browser reads from file 3 and writes to file 4.
        down, up = (fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (first, second))
        quiet = os.open(os.devnull, os.O_RDWR)
        files = [
            (os.POSIX_SPAWN_DUP2, a, b) for a, b in ((quiet, 1), (quiet, 2), (down, 3), (up, 4))
        ]
        self.pid = os.posix_spawn(
            program, [program, *flags, "about:blank"], os.environ | {"HOME": str(home)},
            file_actions=files,
        )  # fmt: skip
        for file in (first, second, down, up, quiet):
            os.close(file)
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """The answer to a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._number:
                assert "error" not in told, (method, told["error"])
                return told["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        told = json.loads(first)
        match told.get("method"), told.get("params", {}):
            case "Network.requestWillBeSent", params:
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown", params:
                self.errors.append(json.dumps(params["exceptionDetails"])[:500])
            case "Log.entryAdded", params if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled", params if params["type"] in ("error", "warning"):
                self.errors.append(json.dumps(params["args"])[:500])
        return told

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of this width."""
        self.resize(width, height)
        scheme = "dark" if dark else "light"
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.requests, self.errors = [], []
        self.ask("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + 30
        while self.run("document.readyState") != "complete":
            assert time.monotonic() < end
            time.sleep(0.01)

    def resize(self, width: int, height: int = 900) -> None:
        """Change the window."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip

    def run(self, script: str) -> Any:
        """The value of an expression, as JSON has it."""
        told = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a keyboard sends it."""
        text = {"text": "\r"} if key == "Enter" else {}
        params = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **params, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **params)

    def names(self) -> list[tuple[str, str]]:
        """(role, name) of everything that a screen reader reads."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            (n["role"]["value"], n.get("name", {}).get("value", ""))
            for n in nodes
            if not n.get("ignored") and "role" in n
        ]

    def picture(self, path: Path) -> None:
        """A screenshot (PNG) of the whole page."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        told = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(told["data"]))

    def close(self) -> None:
        """End it."""
        self._session = None
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)
        os.close(self._in)
        os.close(self._out)
