"""Results for people and machines: aligned text, Markdown, JSON, and bars as SVG."""

import datetime
import json
import os
import platform
from xml.sax.saxutils import escape

COLOURS = {"rearview": "#1b6ca8", "rearview-uring": "#0f4a75", "rearview-xfs": "#5aa5d6"}
OTHERS = "#9aa3ab"


def size(count):
    """Bytes as people read them, three digits."""
    if count is None:
        return "-"
    value, sign = abs(float(count)), "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
            return f"{sign}{value:.{digits}f} {unit}"
        value /= 1024


def text_table(header, rows):
    """Columns aligned: the first two to the left, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def markdown_table(header, rows):
    """The same for the README."""
    lines = [header, ["--"] * len(header), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def svg_bars(title, panels):
    """A panel of bars per (heading, note, [(label, value, text)]), each with its own scale."""
    left, width, bar, gap = 130, 420, 18, 6
    parts, y = [], 56
    for heading, note, bars in panels:
        parts.append(f'<text x="16" y="{y}" class="h">{escape(heading)}</text>')
        parts.append(f'<text x="16" y="{y + 18}" class="n">{escape(note)}</text>')
        y += 30
        most = max([value for _, value, _ in bars] + [1])
        for label, value, text in bars:
            length = max(1.0, width * max(0, value) / most)
            colour = COLOURS.get(label, OTHERS)
            middle = y + bar - 5
            parts.append(f'<text x="{left - 8}" y="{middle}" class="r">{escape(label)}</text>')
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{left + length + 6:.1f}" y="{middle}">{escape(text)}</text>'
            )
            y += bar + gap
        y += 26
    style = (
        "text{font:13px sans-serif;fill:#24292f}.h{font-weight:bold}.r{text-anchor:end}"
        ".n{fill:#57606a}"
        ".t{font-size:16px;font-weight:bold}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 190}" height="{y}">'
        f"<style>{style}</style>"
        '<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="16" y="26" class="t">{escape(title)}</text>' + "".join(parts) + "</svg>\n"
    )


def machine():
    """Where it was measured."""
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def today():
    """The date, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def write(path, text):
    """Writes a result whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path, value):
    """The same for JSON."""
    write(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
