"""Record a run of `cmux_ssh.py demo` on a terminal, and draw it as an SVG that plays once (light and dark).

    python .ci/picture.py .github/demo.svg
"""

import html
import os
import pty
import re
import subprocess
import sys
import time

COLUMNS, LINE, WIDTH = 110, 18, 8.4  # characters; pixels of a line's height and of a character
STYLE = """
  text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; white-space: pre; }
  rect { fill: #f6f8fa; stroke: #d0d7de; }
  text { opacity: 0; animation: show 0s linear forwards; }
  .prompt { fill: #0969da; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } rect { fill: #0d1117; stroke: #30363d; } .prompt { fill: #58a6ff; }
  }
  @media (prefers-reduced-motion: reduce) { text { opacity: 1; animation: none; } }
  @keyframes show { to { opacity: 1; } }
"""


def record():
    """(seconds, line) of all that the demo prints on a terminal of COLUMNS."""
    master, slave = pty.openpty()
    env = dict(os.environ, COLUMNS=str(COLUMNS), LINES="50", NO_COLOR="1")
    began, rows, held = time.monotonic(), [], b""
    program = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cmux_ssh.py")
    child = subprocess.Popen([sys.executable, program, "demo"], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # Linux says so when the other side is closed
            data = b""
        held += data
        *lines, held = held.split(b"\n") if data else [held, b""]
        for line in lines:  # of a line that was written over, the last state
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2])
            rows.append((time.monotonic() - began, text))
        if not data:
            break
    if child.wait():
        sys.exit("The demo failed.")
    return rows


def draw(rows):
    rows = [(at, text[i:i + COLUMNS]) for at, text in rows for i in range(0, max(1, len(text)), COLUMNS)]
    width, height = COLUMNS * WIDTH + 32, len(rows) * LINE + 32
    shown = [f'<text x="16" y="{16 + LINE * n + 14}" style="animation-delay:{at:.2f}s"'
             f'{" class=" + chr(34) + "prompt" + chr(34) if text.startswith("$") else ""}>{html.escape(text)}</text>'
             for n, (at, text) in enumerate(rows) if text]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">'
            f"<title>A run of cmux_ssh.py demo</title><style>{STYLE}</style>"
            f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="6"/>\n' + "\n".join(shown) + "\n</svg>\n")


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        out.write(draw(record()))
