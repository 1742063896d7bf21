"""Takes README's picture: the run page of `gradwatch demo`, in the system's Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

PORT = 8599
TARGET = Path(__file__).parent / "images" / "run.png"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main() -> int:
    """Serve the store named on the command line, and keep a picture of its latest run."""
    store = sys.argv[1] if len(sys.argv) > 1 else "gradwatch.db"
    program = Path(sys.executable).parent / "gradwatch"
    server = subprocess.Popen([program, "ui", "--store", store, "--port", str(PORT)])
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=FLAGS
            )
            page = browser.new_page(viewport={"width": 1400, "height": 1500})
            page.goto(f"http://127.0.0.1:{PORT}/run")
            page.get_by_role("heading", name="Events").wait_for(timeout=30_000)
            page.wait_for_timeout(3000)
            TARGET.parent.mkdir(exist_ok=True)
            page.screenshot(path=TARGET)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
