"""Draws the pictures of docs/how-it-works.md into docs/images."""

from __future__ import annotations

import html
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
INK, FAINT = "#333333", "#999999"
FUSED, PRODUCT, KEPT, LOCAL, NONE = "#cfe8d5", "#d6e4f5", "#f7e3c8", "#f3d4d4", "#ffffff"


class Picture:
    """Shapes of an SVG, drawn in order."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
            f"<title>{html.escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>',
            "</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(self, x: float, y: float, text: str, anchor: str = "middle", color: str = INK) -> None:
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">'
            f"{html.escape(text)}</text>"
        )

    def box(
        self, x: float, y: float, w: float, h: float, color: str, text: str = "", edge: str = INK
    ) -> None:
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{color}" '
            f'stroke="{edge}"/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4 + 15 * (i - (len(lines) - 1) / 2), line)

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.lines.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        return "\n".join((*self.lines, "</svg>", ""))


def layer() -> Picture:
    """One decoder layer as a sequence of ops, with what each reads and writes once."""
    p = Picture(700, 560, "One layer of Gemma 2 as ops")
    steps = [
        (PRODUCT, "linear: q, k, v in one product"),
        (FUSED, "rope_append_cache: rotate q and k,\nwrite k and v into the cache"),
        (FUSED, "attention_cache: scale, soft-cap 50, window, softmax, times v"),
        (PRODUCT, "linear: output"),
        (FUSED, "add_rms_norm: norm, add to the residual, norm for the MLP"),
        (PRODUCT, "linear: gate and up in one product"),
        (FUSED, "geglu: gelu_tanh(gate) * up"),
        (PRODUCT, "linear: down"),
        (FUSED, "add_rms_norm: norm, add to the residual,\nnorm for the next layer"),
    ]
    p.text(310, 24, "normed input of the layer")
    y = 40.0
    centers = []
    for color, text in steps:
        h = 42 if "\n" in text else 32
        p.arrow((310, y - 20 if centers else y - 12), (310, y))
        p.box(130, y, 360, h, color, text)
        centers.append(y + h / 2)
        y += h + 20
    p.arrow((310, y - 20), (310, y))
    p.text(310, y + 14, "normed input of the next layer")
    # The residual stream passes by, and is read and written by the two fused norms only.
    x = 60
    p.text(x, 24, "residual")
    p.arrow((x, 32), (x, centers[4]), (130, centers[4]))
    p.arrow((130, centers[4] + 8), (x, centers[4] + 8), (x, centers[8]), (130, centers[8]))
    p.arrow((130, centers[8] + 8), (x, centers[8] + 8), (x, y + 4))
    p.box(540, centers[1] - 22, 130, 44, KEPT, "KV cache:\nring or whole")
    p.arrow((490, centers[1]), (540, centers[1]))
    p.arrow((605, centers[1] + 22), (605, centers[2]), (490, centers[2]))
    p.box(540, 420, 16, 14, FUSED)
    p.text(564, 431, "fused, one pass", "start")
    p.box(540, 442, 16, 14, PRODUCT)
    p.text(564, 453, "matrix product", "start")
    return p


def ring() -> Picture:
    """The ring of a local layer, window 4 and slack 2, before and after two tokens more."""
    p = Picture(640, 214, "The ring cache of a local layer: window 4, slack 2")
    window, slack = 4, 2
    capacity = window + slack
    for row, end in enumerate((9, 11)):
        top = 50 + row * 100
        p.text(20, top - 14, f"after {end} tokens: position p is in slot p % {capacity}", "start")
        p.text(20, top + 24, "slot", "start", FAINT)
        for slot in range(capacity):
            position = max(q for q in range(end) if q % capacity == slot)
            seen = position > end - 1 - window
            x = 70 + slot * 62
            p.box(x, top, 58, 36, KEPT if seen else NONE, str(position))
            p.text(x + 29, top + 50, str(slot), color=FAINT)
        p.text(460, top + 14, f"token {end - 1} sees {end - window} to {end - 1};", "start")
        older = f"{end - capacity} and {end - window - 1}"
        p.text(460, top + 32, f"{older} are the slack", "start")
    return p


def tiling() -> Picture:
    """Which blocks of the score matrix a local layer's attention computes."""
    p = Picture(700, 314, "Blocks of scores that attention computes")
    block, blocks, window = 24, 9, 4
    for left, local in ((40, False), (350, True)):
        p.text(left, 22, "local layer" if local else "global layer", "start")
        for q in range(blocks):
            for k in range(blocks):
                seen = k <= q and (not local or k >= q - window + 1)
                edge = seen and (k == q or (local and k == q - window + 1 and k > 0))
                color = (LOCAL if edge else PRODUCT) if seen else NONE
                p.box(left + k * block, 34 + q * block, block, block, color, edge="#bbbbbb")
        p.text(left + blocks * block / 2, 268, "keys", color=FAINT)
    p.text(30, 150, "queries", "end", FAINT)
    p.lines[-1] = p.lines[-1].replace("<text ", '<text transform="rotate(-90 26 150)" ')
    legend = (
        (40, PRODUCT, "every query sees every key: no mask"),
        (270, LOCAL, "masked inside: the diagonal, the window's edge"),
        (550, NONE, "never read or computed"),
    )
    for x, color, text in legend:
        p.box(x, 284, 14, 14, color)
        p.text(x + 20, 296, text, "start")
    return p


def main() -> None:
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg())


PICTURES = {"layer": layer, "ring": ring, "tiling": tiling}

if __name__ == "__main__":
    main()
