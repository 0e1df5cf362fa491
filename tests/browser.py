"""A real Chromium without a window, driven by its DevTools protocol: what it shows, asks for and complains about."""

import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
PATIENCE_S = 60.0


class Browser:
    """One tab.

    Attributes:
        asked: Every address that the tab asked for, in order.
        complaints: What the console would show: errors, exceptions, violations of a policy.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self._loaded: set[str] = set()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        self.tell("Page.setLifecycleEventsEnabled", enabled=True)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        number = self._number
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(about["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(f"{about['entry']['level']}: {about['entry']['text']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(about["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(about["args"]))
            case "Page.lifecycleEvent" if about["name"] == "load":
                self._loaded.add(about["loaderId"])

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Show the tab in this size; a phone has touch and two pixels for one."""
        scale = 2 if phone else 1
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Go to an address and wait until everything there is loaded."""
        # By its own name: the page before may still be about to say that it is loaded.
        wanted = self.tell("Page.navigate", url=address)["loaderId"]
        deadline = time.monotonic() + PATIENCE_S
        while wanted not in self._loaded:
            assert time.monotonic() < deadline, f"{address} was not loaded"
            self._hear(json.loads(self._socket.recv(timeout=PATIENCE_S)))

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true; on the way from one page to the next, it may not even make sense."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ask(f"(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.1)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and let go one key, as a person without a mouse does: Tab, Enter, or Space."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " ")}[key]
        about = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        modifiers = 8 if shift else 0
        self.tell("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=modifiers, **about)
        self.tell("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **about)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.tell("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write what is shown as a PNG; or the whole page, however long."""
        picture = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(b64decode(picture["data"]))


def import_certificate(folder: Path, address: str, *, authority: Path, file: Path, passphrase: str) -> None:
    """What a person imports into a browser before its first start: whom to trust, and what to show at an address.

    Args:
        folder: As given to ``browsing``.
        address: Where the certificate is shown; what the browser would ask, a preference answers.
        authority: Certificate in PEM.
        file: Key and certificate (PKCS 12).
        passphrase: Of the file.
    """
    database = folder / ".pki" / "nssdb"
    database.mkdir(parents=True)
    where = ("-d", f"sql:{database}")
    for command in (
        ("certutil", *where, "-N", "--empty-password"),
        ("certutil", *where, "-A", "-n", "authority", "-t", "C,,", "-i", authority),
        ("pk12util", *where, "-i", file, "-W", passphrase),
    ):
        subprocess.run(command, check=True, capture_output=True)
    shown: dict[str, Any] = {"auto_select_certificate": {f"{address},*": {"setting": {"filters": [{}]}}}}
    preferences = folder / "profile" / "Default" / "Preferences"
    preferences.parent.mkdir(parents=True)
    preferences.write_text(json.dumps({"profile": {"content_settings": {"exceptions": shown}}}), encoding="utf-8")


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A Chromium that has never run before; its profile goes into a folder."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    environment = {**os.environ, "HOME": str(folder), "DBUS_SESSION_BUS_ADDRESS": "/dev/null"}
    with subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        try:
            port = _port(profile / "DevToolsActivePort", process)
            tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False, timeout=PATIENCE_S).json()
            (tab,) = [tab for tab in tabs if tab["type"] == "page"]
            with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None, open_timeout=PATIENCE_S) as socket:
                yield Browser(socket)
        finally:
            process.terminate()


def _port(file: Path, process: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not (file.exists() and file.read_text("ascii").count("\n")):
        assert process.poll() is None, "Chromium did not start"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(file.read_text("ascii").splitlines()[0])
