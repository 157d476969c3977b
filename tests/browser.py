"""A headless Chromium driven over its debugging pipe: sizes, dark mode, print, screenshots, measuring what is drawn."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path  # noqa: TC003

ROOT = Path(__file__).parents[1]
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
HOW_TO_GET_IT = "no Chromium on the PATH: install it (Debian, Ubuntu: `apt-get install chromium`) to run the browser tests"
AXE = next((path for path in [Path(os.environ.get("AXE_CORE", "")), ROOT / ".venv/node_modules/axe-core/axe.min.js"] if path.is_file()), None)
HOW_TO_GET_AXE = "axe-core was not found: npm install --prefix .venv axe-core, or name its axe.min.js in AXE_CORE"
# Chromium reads commands from descriptor 3 and answers on 4.
_LAUNCH = """
import os, sys
r, w = (os.dup(int(argument)) for argument in sys.argv[1:3])
for there, here in ((r, 3), (w, 4)):
    os.dup2(there, here)
    os.set_inheritable(here, True)  # dup2 of a descriptor onto itself leaves it closed on exec
os.execv(sys.argv[3], sys.argv[3:])
"""

OVERLAPS = """
(() => {
  const bad = [];
  for (const svg of document.querySelectorAll('svg.plot')) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]).filter(([s, r]) => s.trim() && r.width);
    for (const [s, r] of texts)
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1 || r.bottom > frame.bottom + 1)
        bad.push('clipped: ' + s + ' in ' + svg.querySelector('title').textContent);
    for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
      const [a, p] = texts[i], [b, q] = texts[j];
      const w = Math.min(p.right, q.right) - Math.max(p.left, q.left), h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (w > 1.5 && h > 0.35 * Math.min(p.height, q.height)) bad.push('overlap: ' + a + ' | ' + b + ' in ' + svg.querySelector('title').textContent);
    }
  }
  return bad;
})()
"""


class Browser:
    """Chromium with one page, which can be opened, resized, asked and photographed. Use as a context manager."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_it, self._write = os.pipe()
        self._read, from_it = os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(to_it), str(from_it), *command], pass_fds=(to_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_it)
        os.close(from_it)
        self._buffer, self._last, self.events = b"", 0, []
        self._session = None
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise

    def _start(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path) -> Browser:
        """Show a page, as if nothing had been shown before."""
        self.size(1280, 800)
        self.media()
        self.send("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        return self

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.write(self._write, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            self.process.wait(10)
        except (subprocess.TimeoutExpired, OSError):
            self.process.kill()
            self.process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method: str, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _next(self):
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "Chromium went away"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def size(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def media(self, media: str = "", scheme: str = "light") -> None:
        self.send("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def ask(self, expression: str):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": self._page()} if whole else {}))["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def _page(self) -> dict:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def pdf(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"]))
        return path

    def axe(self) -> list[str]:
        """What axe-core objects to: rule, and the first element that breaks it."""
        self.ask(AXE.read_text(encoding="utf-8") + "; 0")
        ask = "axe.run({iframes: false}).then(r => r.violations.map(v => v.id + ': ' + v.help + ' ' + v.nodes[0].html.slice(0, 200)))"
        return self.ask(ask)

    def overlaps(self) -> list[str]:
        """Texts of the figures that are cut off or that lie on one another."""
        return self.ask(OVERLAPS)

    def complaints(self) -> list[str]:
        """Everything on the console, and every exception."""
        said = [e["params"]["entry"]["text"] for e in self.events if e.get("method") == "Log.entryAdded"]
        said += [str(e["params"]["args"]) for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]
        return said + [str(e["params"]) for e in self.events if e.get("method") == "Runtime.exceptionThrown"]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself and data inside it left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith("data:")]
