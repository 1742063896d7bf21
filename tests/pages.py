"""What tests ask of a page in a browser."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import expect

LONG = 30_000  # milliseconds until a page of Streamlit's is there, on a busy machine


@contextlib.contextmanager
def served(store, home):
    """`gradwatch ui` on a store, in a fresh home: nothing may be asked. Address, process, port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [Path(sys.executable).parent / "gradwatch", "ui", "--store", store, "--port", str(port)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "HOME": str(home.absolute())},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
                break
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process, port
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def open_run(page, address, run):
    """Go to a run's page, and wait until all of it is there."""
    page.goto(f"{address}/run?run={run}")
    expect(page.get_by_role("heading", name=run, exact=True)).to_be_visible(timeout=LONG)
    expect(page.get_by_role("heading", name="Events")).to_be_visible(timeout=LONG)


def overlapping_texts(page, charts='[data-testid="stVegaLiteChart"] svg'):
    """Pairs of texts drawn on each other within a chart."""
    return page.evaluate(
        """charts => {
        const found = [];
        for (const chart of document.querySelectorAll(charts)) {
            const texts = [...chart.querySelectorAll('text')].filter(t => t.textContent.trim()
                && getComputedStyle(t).opacity !== '0' && t.getAttribute('opacity') !== '0');
            const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
            for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
                const [a, p] = boxes[i], [b, q] = boxes[j];
                const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (x > 2 && y > 3) found.push(a + ' | ' + b);
            }
        }
        return found;
    }""",
        charts,
    )
