"""What tests ask of a page in a browser."""

from playwright.sync_api import expect

LONG = 30_000  # milliseconds until a page of Streamlit's is there, on a busy machine


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
