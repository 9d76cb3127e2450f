"""A real Chromium without a window, driven through its DevTools protocol: the system's own browser."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from itertools import count

import websocket

PATIENCE = float(os.environ.get("PATIENCE", 120))  # seconds; more on a machine that is busy
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--hide-scrollbars", "--disable-background-networking", "--remote-debugging-port=0",
         "--window-size=1100,1400")  # fmt: skip


def find():
    """The browser's path, None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def waited(look, seconds=PATIENCE, what="it"):
    """What `look` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


class Browser:
    """One page. `asked`: the addresses that it has asked for."""

    def __init__(self, path, folder):
        self.process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL
        )
        port = folder / "DevToolsActivePort"
        number = waited(lambda: port.exists() and port.read_text().split("\n")[0], what="Chromium")
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list") as answer:
            (page,) = [t for t in json.load(answer) if t["type"] == "page"]
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], suppress_origin=True, timeout=PATIENCE)
        self.numbers, self.asked = count(1), []
        for domain in ("Page", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method, **given):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while (heard := json.loads(self.socket.recv())).get("id") != number:
            if heard.get("method") == "Network.requestWillBeSent":
                self.asked.append(heard["params"]["request"]["url"])
        assert "error" not in heard, heard
        return heard["result"]

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression, seconds=PATIENCE):
        """Poll an expression until it is true; the page's text is shown if it never is."""
        try:
            return waited(lambda: self.js(expression), seconds, expression)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def text(self):
        return self.js("document.body.innerText")

    def click(self, selector, text=""):
        """Press the mouse on the first visible element of a selector with this text."""
        seen = f"""[...document.querySelectorAll({selector!r})].find(
            e => e.offsetParent && e.innerText.includes({text!r}) && !e.disabled)"""
        self.wait(f"!!({seen})")
        at = self.wait(f"""(async () => {{ const e = {seen}; if (!e) return null
            const box = () => (r => ({{x: r.x + r.width / 2, y: r.y + r.height / 2}}))(e.getBoundingClientRect())
            e.scrollIntoView({{block: "center", behavior: "instant"}}); const old = box()
            await new Promise(done => setTimeout(done, 100)); const now = box()
            const still = now.x === old.x && now.y === old.y && e.contains(document.elementFromPoint(now.x, now.y))
            return still ? now : null }})()""")  # a page that is still being laid out moves on under the mouse
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def upload(self, selector, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
