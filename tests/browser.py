"""A headless Chromium with one tab, driven by the DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from io import BytesIO

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
connect = pytest.importorskip("websockets.sync.client").connect
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "t": 84, "s": 83, "u": 85}


class Browser:
    """One tab."""

    def __init__(self, socket):
        self.socket, self.number = socket, 0

    def call(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def wait(self, expression, expected):
        deadline = time.monotonic() + 60
        while (seen := self.value(expression)) != expected:
            assert time.monotonic() < deadline, f"{expression} is {seen!r}, not {expected!r}"
            time.sleep(0.02)

    def press(self, key, *, repeat=False):
        text = {"text": key} if len(key) == 1 else {}
        code = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, autoRepeat=repeat, **text
            )

    def screenshot(self):
        return Image.open(BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"])))


@contextmanager
def opened(profile):
    """A browser that keeps its files in the folder `profile`, for a `with` block."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1000,760", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        tabs = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60).read())
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait()
