"""Draw a run of `cmux_ssh.py demo` on a terminal as an SVG that plays once, light and dark.

    python .ci/picture.py .github/demo.svg
"""

import html
import os
import pty
import re
import subprocess
import sys
import time

COLUMNS, LINE, WIDTH = 110, 18, 8.4  # characters; pixels of a line's height and a character
PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cmux_ssh.py")
STYLE = """
  text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; white-space: pre;
         opacity: 0; animation: show 0s linear forwards; }
  rect { fill: #f6f8fa; stroke: #d0d7de; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } rect { fill: #0d1117; stroke: #30363d; }
  }
  @media (prefers-reduced-motion: reduce) { text { opacity: 1; animation: none; } }
  @keyframes show { to { opacity: 1; } }
"""


def read(master):
    """What comes from a terminal, until its other side is closed."""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux, where the other side is closed
            return
        if not data:
            return
        yield data


def record():
    """(seconds since the start, line) of all that the demo prints."""
    master, slave = pty.openpty()
    began, rows, held = time.monotonic(), [], b""
    child = subprocess.Popen(
        [sys.executable, PROGRAM, "demo"], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave,
        env=dict(os.environ, COLUMNS=str(COLUMNS), LINES="50", NO_COLOR="1"))
    os.close(slave)
    for data in read(master):
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            # Of a line that was written over, the last state; without escape sequences.
            text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
            rows.append((time.monotonic() - began, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)))
    if child.wait():
        sys.exit("The demo failed.")
    return rows


def draw(rows):
    rows = [(seconds, text[start:start + COLUMNS])
            for seconds, text in rows for start in range(0, max(1, len(text)), COLUMNS)]
    width, height = round(COLUMNS * WIDTH) + 32, len(rows) * LINE + 32
    shown = [f'<text x="16" y="{LINE * number + 30}" style="animation-delay:{seconds:.2f}s">'
             f"{html.escape(text)}</text>" for number, (seconds, text) in enumerate(rows) if text]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>A run of cmux_ssh.py demo</title><style>{STYLE}</style>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>',
        *shown, "</svg>", ""])


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        out.write(draw(record()))
