"""ComfyUI's page in headless Chromium: load a UI-format workflow, run it, look at it.

CHROMIUM is the browser's path (else `chromium` on PATH). Needs the package playwright, not its own browsers.
Requests that leave the loopback range are refused and listed, so a page that depends on the network is seen.
"""
from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]
READY = "() => window.app && window.app.graph && window.app.canvas && document.querySelector('canvas#graph-canvas')"
FIT = """() => { const n = app.graph._nodes; if (!n.length) return;
  const c = app.canvas, e = c.canvas.getBoundingClientRect();
  const box = n.reduce((b, x) => [Math.min(b[0], x.pos[0]), Math.min(b[1], x.pos[1] - 40),
    Math.max(b[2], x.pos[0] + x.size[0]), Math.max(b[3], x.pos[1] + x.size[1])], [1e9, 1e9, -1e9, -1e9]);
  const s = Math.min(1.2, e.width / (box[2] - box[0] + 240), e.height / (box[3] - box[1] + 240));
  c.ds.scale = s; c.ds.offset = [e.width / 2 / s - (box[0] + box[2]) / 2, e.height / 2 / s - (box[1] + box[3]) / 2];
  c.setDirty(true, true); }"""
DROP = """([name, text]) => { const t = new DataTransfer();
  t.items.add(new File([text], name, {type: 'application/json'}));
  for (const type of ['dragenter', 'dragover', 'drop'])
    document.querySelector('canvas#graph-canvas').dispatchEvent(
      new DragEvent(type, {dataTransfer: t, bubbles: true, cancelable: true, clientX: 700, clientY: 400})); }"""


class Frontend:
    """The page of one server. with Frontend(url) as ui: ui.load(workflow); ui.queue(); ui.shot("x.png")"""

    def __init__(self, url: str, chromium=None, size=(1400, 900), timeout: float = 180):
        self.url, self.size, self.timeout = url.rstrip("/"), size, timeout
        self.chromium = chromium or os.environ.get("CHROMIUM") or shutil.which("chromium")
        self.blocked, self.console = [], []
        self.page: Page | None = None

    def __enter__(self) -> Frontend:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=self.chromium, headless=True, args=FLAGS)
        self.page = self._browser.new_page(viewport={"width": self.size[0], "height": self.size[1]})
        self.page.set_default_timeout(self.timeout * 1000)
        self.page.on("console", lambda m: self.console.append((m.type, m.text)))
        self.page.on("pageerror", lambda e: self.console.append(("pageerror", str(e))))
        self.page.route("**/*", self._gate)
        self.page.goto(self.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(1500)  # extensions' setup() and the first layout
        return self

    def __exit__(self, *exc) -> None:
        self._browser.close()
        self._playwright.stop()

    def _gate(self, route) -> None:
        host = urlsplit(route.request.url).hostname
        if host in (None, "127.0.0.1", "localhost", "::1"):
            route.continue_()
        else:
            self.blocked.append(route.request.url)
            route.abort()

    def load(self, workflow: dict | str | Path, drop: bool = False) -> None:
        """Load by app.loadGraphData, or as a file dropped on the canvas, as a person would."""
        path = None if isinstance(workflow, dict) else Path(workflow)
        text = json.dumps(workflow) if path is None else path.read_text()
        if drop:
            self.page.evaluate(DROP, [path.name if path else "workflow.json", text])
            wanted = len(json.loads(text)["nodes"])
            self.page.wait_for_function(f"() => app.graph._nodes.length === {wanted}")
        else:
            self.page.evaluate("w => app.loadGraphData(w)", json.loads(text))
        self.page.wait_for_timeout(500)
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(500)

    def missing(self) -> list[str]:
        """Node types of the loaded workflow that this server does not have."""
        return self.page.evaluate("() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]"
                                  " && !n.isVirtualNode && !n.subgraph).map(n => n.type)")

    def api_prompt(self) -> dict:
        """What the page would send: the workflow in API format."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def queue(self, wait: bool = True) -> dict:
        """Queue the workflow as the Run button does; returns the history entry when it has ended."""
        history = "async () => (await fetch('/history')).json()"
        known = set(self.page.evaluate(history))
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        until = time.monotonic() + self.timeout
        while wait and time.monotonic() < until:
            for key, entry in self.page.evaluate(history).items():
                if key not in known:
                    self.page.wait_for_timeout(800)  # the result's pictures
                    return entry
            self.page.wait_for_timeout(200)
        if wait:
            raise TimeoutError("the queued workflow has not ended; does the page show an error?")
        return {}

    def shot(self, path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))
        return path
