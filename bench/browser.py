"""Chromium behind chromedriver, for the benchmarks of the page."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--window-size=1280,900"]

# Milliseconds from navigation to the frame in which a run's first chart is drawn.
DRAWN = """
const done = arguments[0];
(function look() {
  const chart = document.querySelector('.chart');
  const drawn = chart && / at step /.test(chart.getAttribute('aria-label') || '');
  requestAnimationFrame(() => drawn ? done(performance.now()) : look());
})();
"""


def found():
    """Whether this machine has one."""
    return shutil.which("chromedriver") is not None


class Browser:
    """A browser with one window and nothing in its cache."""

    def __init__(self):
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for line in self.process.stdout:
            if port := re.search(r"successfully on port (\d+)", line):
                self.address = f"http://127.0.0.1:{port.group(1)}"
                break
        # Navigation returns at once, so that whoever asks can look on.
        options = {"pageLoadStrategy": "none", "goog:chromeOptions": {"args": ARGUMENTS}}
        self.session = self.post("/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def post(self, path, body):
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def show(self, address):
        self.post(f"/session/{self.session}/url", {"url": address})

    def seconds_until_drawn(self, address):
        """Seconds from navigation to a run's page until its charts are drawn."""
        self.show(address)
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.post(f"/session/{self.session}/execute/async", {"script": DRAWN, "args": []}) / 1e3
            except OSError:
                # The script went with the page before.
                if time.monotonic() > deadline:
                    raise

    def end(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
