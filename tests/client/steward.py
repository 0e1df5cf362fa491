"""A steward at the hospital's page: served in this process, over a real socket, and asked by HTTP."""

import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from client.beside import Told
from client.page import page_server
from client.password import set_password
from client.settings import read_settings
from server.demo import free_port
from shared_models.config import read_toml
from shared_models.listening import listen

PASSWORD = "correct horse battery"  # noqa: S105 - a test's


def add_page(settings_file: Path, **more: Any) -> int:
    """Give a hospital a page, and the page a password; returns its port."""
    port = free_port()
    settings_file.write_text(
        tomli_w.dumps({**more, **read_toml(settings_file, "settings file"), "page": {"port": port}}), encoding="utf-8"
    )
    set_password(read_settings(settings_file).state, PASSWORD)
    return port


@contextmanager
def serving(settings_file: Path, told: Told | None = None) -> Iterator[str]:
    """The page of a hospital that has one; its address."""
    page = read_settings(settings_file).page
    assert page is not None
    server = page_server(settings_file, page, told)
    with listen("127.0.0.1", page.port, hint="") as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"{page.scheme}://127.0.0.1:{page.port}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@dataclass
class Steward:
    """A browser without a window, scripts and a person.

    Attributes:
        client: Asks, and keeps cookies.
    """

    client: httpx.Client

    @property
    def origin(self) -> str:
        """What a browser says of where a form came from."""
        return str(self.client.base_url).rstrip("/")

    def log_in(self, password: str = PASSWORD) -> httpx.Response:
        """Send the form of the login."""
        return self.client.post("/login", data={"password": password}, headers={"origin": self.origin})

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Look at a page."""
        return self.client.get(path, headers=headers)

    def fields(self, path: str, action: str) -> dict[str, str]:
        """The hidden fields of a form on a page, as a browser would send them."""
        form = re.search(rf'<form[^>]*action="{action}">(.*?)</form>', self.get(path).text, re.DOTALL)
        assert form is not None
        return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form[1]))

    def send(self, path: str, fields: dict[str, str], **headers: str) -> httpx.Response:
        """Send a form as the page itself would."""
        return self.client.post(path, data=fields, headers={"origin": self.origin, **headers})

    def approve(self, study: str, **headers: str) -> httpx.Response:
        """One click."""
        path = f"/studies/{study}"
        return self.send(f"{path}/approve", self.fields(path, f"{path}/approve"), **headers)


@contextmanager
def visiting(address: str, tls: ssl.SSLContext | bool = True) -> Iterator[Steward]:
    """Somebody at the page, who is not logged in; with whom they trust, and what they show."""
    with httpx.Client(base_url=address, trust_env=False, timeout=60, verify=tls) as client:
        yield Steward(client)
