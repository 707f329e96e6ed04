"""The page's colours on a light and on a dark screen; its drawings change theirs with it."""

import base64

from t5lib.report.models import SOFTMAX, T5, T5_LIGHT, T5_PALE
from t5lib.report.plots import GRID, GROUND, INK, MUTED, RULE

# CSS variable → as drawn, and on a dark ground. Orange is the darker the further trained on both, as captions say.
COLOURS = {
    "ink": (INK, "#e6e4df"),
    "muted": (MUTED, "#a3aab2"),
    "axis": (RULE, "#454b52"),
    "grid": (GRID, "#2b2f35"),
    "ground": (GROUND, "#1d2024"),
    "softmax": (SOFTMAX, "#5ea9e2"),
    "t5": (T5, "#ea6a20"),
    "t5-light": (T5_LIGHT, "#f2aa60"),
    "t5-pale": (T5_PALE, "#f7dcb9"),
}


def css(*, dark: bool) -> str:
    """Declarations of all variables."""
    return "; ".join(f"--{name}: {pair[dark]}" for name, pair in COLOURS.items())


def variable(colour: str) -> str:
    """CSS for a colour of COLOURS, as drawn."""
    return next(f"var(--{name})" for name, (drawn, _) in COLOURS.items() if drawn == colour)


def drawing(svg: str) -> str:
    """An SVG file's text as the src of an img; where the screen is dark it is drawn in dark, its ground included."""
    style = (
        f"<style>:root {{{css(dark=False)}}} @media (prefers-color-scheme: dark) {{:root {{{css(dark=True)}}}}}</style>"
    )
    for drawn, _ in COLOURS.values():
        svg = svg.replace(drawn, variable(drawn))
    return _uri("svg+xml", svg.replace("<defs>", f"{style}<defs>", 1).encode())


def photograph(png: bytes) -> str:
    """A PNG file's content as the src of an img; it is the same on every screen."""
    return _uri("png", png)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
