"""The drawings of the site, for light and dark backgrounds; written by ``python docs/img/draw.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

THEMES = {
    "light": {"ink": "#1f2328", "soft": "#59636e", "line": "#8c959f", "frozen": "#e8ecf1", "edge": "#afb8c1"}
    | {"trained": "#ffe3c2", "trained_edge": "#d9822b", "call": "#dcebfa", "call_edge": "#3b7dc4"},
    "dark": {"ink": "#e6edf3", "soft": "#9aa4af", "line": "#6e7781", "frozen": "#2b313a", "edge": "#545d68"}
    | {"trained": "#5a3a14", "trained_edge": "#e8a04f", "call": "#163656", "call_edge": "#6cb0f0"},
}
SANS = "font-family='Inter, Helvetica, Arial, sans-serif'"
MONO = "font-family='ui-monospace, Menlo, DejaVu Sans Mono, monospace'"
Theme = dict[str, str]


def box(t: Theme, x: float, y: float, w: float, h: float, kind: str, radius: float = 8) -> str:
    edge = t["edge"] if kind == "frozen" else t[f"{kind}_edge"]
    return (
        f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='{radius}' fill='{t[kind]}' stroke='{edge}' "
        "stroke-width='1.5'/>"
    )


def text(t: Theme, x: float, y: float, words: str, size: float = 15, colour: str = "ink", **style: str) -> str:
    font = MONO if style.get("font") == "mono" else SANS
    weight, anchor = style.get("weight", "400"), style.get("anchor", "middle")
    return (
        f"<text x='{x}' y='{y}' {font} font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' "
        f"fill='{t[colour]}'>{words}</text>"
    )


def arrow(t: Theme, *points: tuple[float, float]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{t['line']}' stroke-width='1.6' marker-end='url(#head)'/>"


def labelled(t: Theme, x: float, y: float, w: float, h: float, kind: str, *lines: str) -> str:
    """A box with a first line in monospace and softer lines below it."""
    top = y + h / 2 - 9 * (len(lines) - 1) + 5
    words = [text(t, x + w / 2, top, lines[0], 15, font="mono", weight="600")]
    words += [text(t, x + w / 2, top + 19 * (i + 1), line, 12.5, "soft") for i, line in enumerate(lines[1:])]
    return box(t, x, y, w, h, kind) + "".join(words)


def update(t: Theme) -> tuple[int, int, str, list[str]]:
    """W + AB: the sizes of the three matrices, and a parameter count for one layer."""
    parts = [
        box(t, 40, 50, 230, 230, "frozen", 4),
        text(t, 155, 175, "W", 40, weight="600"),
        text(t, 155, 306, "frozen, in × out", 14, "soft"),
        text(t, 304, 176, "+", 34, "soft"),
        text(t, 352, 174, "s ·", 24, "soft"),
        box(t, 388, 50, 34, 230, "trained", 4),
        text(t, 405, 173, "A", 24, weight="600"),
        text(t, 405, 306, "in × r", 14, "soft"),
        text(t, 446, 171, "·", 30, "soft"),
        box(t, 468, 148, 230, 34, "trained", 4),
        text(t, 583, 173, "B", 24, weight="600"),
        text(t, 583, 206, "r × out", 14, "soft"),
        text(t, 583, 68, "trained", 15, weight="600"),
        text(t, 583, 90, "rank r, scale s = alpha / r", 14, "soft"),
        text(t, 583, 262, "4096 × 4096 weight, r = 16:", 14, "soft"),
        text(t, 583, 284, "131,072 of 16,777,216 numbers (0.8%)", 14, "soft"),
        text(t, 369, 352, "y = x·W + s·(x·A)·B", 20, font="mono", weight="600"),
        text(t, 369, 378, "two thin products next to the frozen one; A·B itself is never built", 14, "soft"),
    ]
    return 738, 400, "LoRA: a frozen weight W plus a low-rank update s·A·B of two thin trained matrices", parts


def engine(t: Theme) -> tuple[int, int, str, list[str]]:
    """Adapting a program: the steps done once, and those done in each training step."""
    parts = [
        text(t, 30, 34, "Once", 17, weight="600", anchor="start"),
        labelled(t, 30, 54, 180, 70, "frozen", "fn, params, batch", "your program"),
        labelled(t, 262, 54, 180, 70, "call", "jlora.trace", "axes of every weight"),
        labelled(t, 494, 54, 180, 70, "call", "jlora.init", "A random, B zero"),
        labelled(t, 726, 54, 180, 70, "trained", "adapters", "{path: factors}"),
        arrow(t, (210, 89), (258, 89)),
        arrow(t, (442, 89), (490, 89)),
        text(t, 468, 78, "uses", 12.5, "soft"),
        arrow(t, (674, 89), (722, 89)),
        text(t, 584, 156, "LoraConfig: rank, alpha, targets", 13, "soft"),
        arrow(t, (584, 142), (584, 128)),
        text(t, 138, 218, "In every step, under jit and grad", 17, weight="600", anchor="start"),
        labelled(t, 30, 236, 180, 70, "call", "jlora.attach", "params + adapters"),
        arrow(t, (816, 124), (816, 190), (120, 190), (120, 232)),
        labelled(t, 262, 236, 180, 70, "call", "jlora.lora(fn)", "fn staged to a jaxpr"),
        arrow(t, (210, 271), (258, 271)),
        text(t, 236, 260, "tree", 12.5, "soft"),
        text(t, 494, 250, "Each equation of the jaxpr:", 14, anchor="start", weight="600"),
    ]
    rows = [
        ("no adapted operand", "runs unchanged", "frozen"),
        ("moves the weight: transpose, slice, cast", "moves A and B", "trained"),
        ("uses it: dot_general, conv, gather", "x·W + s·(x·A)·B", "trained"),
        ("no factored form: exp(W)", "sums W + s·A·B, with a warning", "call"),
    ]
    for i, (case, then, kind) in enumerate(rows):
        y = 262 + 52 * i
        parts += [
            box(t, 494, y, 412, 44, kind, 6),
            text(t, 508, y + 19, case, 13, anchor="start"),
            text(t, 508, y + 36, then, 12.5, "soft", anchor="start"),
        ]
    parts += [
        arrow(t, (442, 271), (490, 271)),
        labelled(t, 262, 350, 180, 70, "frozen", "result", "of fn, adapted"),
        arrow(t, (490, 385), (446, 385)),
    ]
    return 936, 488, "The engine: trace and init once; attach and lora in every step", parts


DRAWINGS: dict[str, Callable[[Theme], tuple[int, int, str, list[str]]]] = {"update": update, "engine": engine}


def drawings() -> dict[str, str]:
    """The SVG files by name."""
    found = {}
    for name, draw in DRAWINGS.items():
        for theme, colours in THEMES.items():
            width, height, title, parts = draw(colours)
            head = (
                "<marker id='head' viewBox='0 0 10 10' refX='8' refY='5' markerWidth='7' markerHeight='7' "
                f"orient='auto-start-reverse'><path d='M 0 1 L 9 5 L 0 9 z' fill='{colours['line']}'/></marker>"
            )
            body = "\n".join([f"<title>{title}</title>", f"<defs>{head}</defs>", *parts])
            size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'"
            found[f"{name}-{theme}.svg"] = f"<svg xmlns='http://www.w3.org/2000/svg' {size}>\n{body}\n</svg>\n"
    return found


if __name__ == "__main__":
    for name, content in drawings().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")
