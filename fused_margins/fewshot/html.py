"""A report as one HTML file: style and pictures are inside, it loads nothing, opens offline, and suits a phone."""

import base64
import struct
from html import escape
from pathlib import Path

from .runs import write_text
from .tables import Table

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DOTS_PER_CSS_PIXEL = 1.5  # pictures are drawn that much finer than they are shown, for sharp screens and print

# "none" keeps a browser from loading whatever a text might smuggle in.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5f6670; --paper: #fff; --line: #dfe3e8; --band: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --faint: #9aa3ae; --paper: #14171a; --line: #31373e; --band: #1d2125 }
  img.plot { filter: invert(0.92) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line) }
p { max-width: 44rem; margin: .6rem 0 }
.lead, figcaption { color: var(--faint) }
.table, .picture { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom }
tbody th { font-weight: normal }
.numeric td, .numeric th:not(:first-child) { text-align: right; white-space: nowrap }
tbody tr:nth-child(even) { background: var(--band) }
figure { margin: 1rem 0 }
figcaption { font-size: .9rem; max-width: 44rem; margin: .4rem 0 }
/* What is wider than a phone shrinks to 36rem at most, so that its text stays legible, and scrolls. */
img { display: block; height: auto; max-width: max(100%, 36rem) }
@media print {
  :root { color-scheme: light; --text: #000; --faint: #444; --paper: #fff; --line: #bbb; --band: #fff }
  body { max-width: none; padding: 0; font-size: 10pt }
  img.plot { filter: none }
  .picture, tr { break-inside: avoid }
  h2, figcaption { break-after: avoid }
  img { max-width: 100% }
  .table, .picture { overflow: visible }
}
"""


class Page:
    """A page to which sections, paragraphs, tables and pictures are added from top to bottom; all text is escaped.

    Args:
        title: heading of the page.
        lead: a sentence or two below it.

    Example:
        >>> page = Page("Margins", "What a < 0 does.")
        >>> page.section("Accuracy")
        >>> page.table(Table("Percent", ["margin", "1-shot"], [["-0.3", "48.7"]]))
        >>> "What a &lt; 0 does." in page.html()
        True
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self.parts.append(f'<p class="lead">{escape(lead)}</p>')

    def section(self, title: str) -> None:
        self.parts.append(f"<h2>{escape(title)}</h2>")

    def paragraph(self, text: str) -> None:
        self.parts.append(f"<p>{escape(text)}</p>")

    def table(self, table: Table) -> None:
        self.parts.append(table.html())

    def picture(self, path: Path, caption: str, photographs: bool = False) -> None:
        """The PNG file as it is now, inside the page; dark screens turn a plot dark, but no `photographs`."""
        data = path.read_bytes()
        if not data.startswith(PNG_SIGNATURE):
            raise ValueError(f"path: expected a PNG file, {path} is none")
        width, height = (round(size / DOTS_PER_CSS_PIXEL) for size in struct.unpack(">II", data[16:24]))
        kind = "photographs" if photographs else "plot"
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        image = f'<img class="{kind}" width="{width}" height="{height}" alt="{escape(caption)}" src="{source}">'
        self.parts.append(
            f'<figure><div class="picture">{image}</div>\n<figcaption>{escape(caption)}</figcaption></figure>'
        )

    def html(self) -> str:
        head = [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
        ]
        return "\n".join([*head, *self.parts, "</body>", "</html>", ""])

    def write(self, path: Path) -> None:
        """The page as a file, whole or not at all."""
        write_text(path, self.html())
