"""Pictures of a tree: text, and one picture description that is rendered as SVG or PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from sequoia_kernels.tree.placement import Shape, horizontal_positions

__all__ = ["Look", "Picture", "draw_text", "make_picture", "render_png", "render_svg", "shade"]

# A line of text begins with one branch sign a level, so a deep tree's text grows with the square of its depth.
MAX_TEXT_NODES = 4096
MAX_PNG_PIXELS = 2**16 - 1  # a side; matplotlib's limit

INK = "#1f2937"
FAINT_INK = "#6b7280"
GUIDE = "#eef1f5"
# Values on a log scale from 0.001 (first) to 1 (last): most nodes of a large tree are worth less than 0.02.
VALUE_COLOURS = ((0xE3, 0xF0, 0xF2), (0x9C, 0xD0, 0xD6), (0x3D, 0x9B, 0xB3), (0x1D, 0x62, 0x8F), (0x17, 0x2F, 0x5B))
VALUE_DECADES = 3
PLAIN_VALUE = 0.1  # colour of all nodes when no acceptance vector is given

LEVEL_HEIGHT = 64
MARGIN = 24
HEADER = 56
LABEL_COLUMN = 64


class Look(NamedTuple):
    """The colours of a picture, and its words. Colours are those of SVG; a PNG needs them as "#rrggbb"."""

    ink: str
    faint_ink: str
    guide: str  # of every second level's band
    colour: Callable[[float], str]  # of a value in [0, 1]
    label_ink: Callable[[float], str]  # of a label on that colour
    heading: str | None = None  # None tells the size and the tokens expected
    legend: str = "value of a node"
    labels: Sequence[str] | None = None  # of the nodes; None writes their numbers where there is room
    titles: Sequence[str] | None = None  # what pointing at a node shows; None tells its place and value


class Edge(NamedTuple):
    """A curve from a parent's lower rim to a child's upper rim."""

    x0: float
    y0: float
    x1: float
    y1: float
    stroke_width: float
    colour: str


class Node(NamedTuple):
    """A disc, its id where there is room for it, and what a tooltip says."""

    x: float
    y: float
    radius: float
    fill: str
    outline: str
    label: str
    label_colour: str
    label_size: float
    title: str


class Text(NamedTuple):
    """A line of text; y is its vertical centre."""

    x: float
    y: float
    text: str
    size: float
    colour: str = INK
    anchor: str = "start"  # start, middle or end
    bold: bool = False


class Box(NamedTuple):
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass
class Picture:
    """All that is drawn, in pixels from the upper left corner, in drawing order: boxes, edges, nodes, texts."""

    width: float
    height: float
    title: str
    boxes: list[Box] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


def draw_text(tree: Shape, values: Sequence[float] | None) -> str:
    """Return the tree as text, one node a line, children below their parent."""
    if tree.num_nodes > MAX_TEXT_NODES:
        raise ValueError(
            f"TokenTree.draw: a drawn tree must have at most {MAX_TEXT_NODES} nodes, got {tree.num_nodes}; save an SVG"
        )
    lines = []
    stack = [(0, "", "")]
    while stack:
        node, branch, below = stack.pop()
        rank = f"  rank {tree.rank(node)}" if node else ""
        value = f"  value {_short(values[node])}" if values is not None else ""
        lines.append(f"{branch}{node}{rank}{value}")
        children = tree.children(node)
        for child in reversed(children):
            last = child == children[-1]
            stack.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))
    return "\n".join(lines)


def make_picture(tree: Shape, values: Sequence[float] | None, look: Look | None = None) -> Picture:
    """Lay a tree out and describe its picture; without the nodes' values, in [0, 1], all of them look alike."""
    look = PAPER if look is None else look
    largest, smallest = _radii(tree.num_nodes)
    plain_radius = max(smallest, 0.6 * largest)
    if values is None:
        radii = [plain_radius] * tree.num_nodes
    else:
        radii = [max(smallest, largest * math.sqrt(min(value, 1.0))) for value in values]
    gap = max(3.0, 0.3 * largest)
    title = _headline(tree, values) if look.heading is None else look.heading

    tree_x = horizontal_positions(tree, radii, gap, 2.2 * gap)
    tree_width = max(x + radius for x, radius in zip(tree_x, radii, strict=True))
    # The header and the legend stand in the margin above and below, and need some width of their own.
    inner_width = max(tree_width, 8.2 * len(title) - 2 * LABEL_COLUMN, 300.0)
    width = inner_width + 2 * (MARGIN + LABEL_COLUMN)
    left = MARGIN + LABEL_COLUMN + (inner_width - tree_width) / 2
    top = MARGIN + HEADER + LEVEL_HEIGHT / 2
    legend_height = 44 if values is not None else 0
    height = MARGIN + HEADER + tree.num_levels * LEVEL_HEIGHT + legend_height + MARGIN

    picture = Picture(width, height, title)
    picture.texts.append(Text(MARGIN, MARGIN + 8, title, 15, look.ink, bold=True))
    _add_levels(picture, tree, values, width, look)
    depths, parents = tree.depths, tree.parents
    for node in range(tree.num_nodes):
        value = PLAIN_VALUE if values is None else values[node]
        x, y, radius = left + tree_x[node], top + depths[node] * LEVEL_HEIGHT, radii[node]
        if node:
            parent = parents[node]
            stroke_width = 0.9 if values is None else 0.7 + 3.0 * math.sqrt(min(value, 1.0))
            start = (left + tree_x[parent], y - LEVEL_HEIGHT + radii[parent])
            picture.edges.append(Edge(*start, x, y - radius, stroke_width, look.colour(max(value, 0.004))))
        label = str(node) if look.labels is None else look.labels[node]
        label_size = min(12.0, 1.05 * radius)
        if look.labels is None:
            fits = label_size >= 6.0 and 0.62 * label_size * len(label) <= 1.8 * radius
        else:  # rather small than missing
            label_size = min(label_size, 1.8 * radius / (0.62 * max(len(label), 1)))
            fits = label_size >= 8.0
        title_text = f"node {node}, level {depths[node]}"
        if node:
            title_text += f", rank {tree.rank(node)} below node {parents[node]}"
        if values is not None:
            title_text += f", value {_short(values[node])}"
        if look.titles is not None:
            title_text = look.titles[node]
        outline, ink = look.colour(min(1.0, value * 6 + 0.03)), look.label_ink(value)
        shown = label if fits else ""
        picture.nodes.append(Node(x, y, radius, look.colour(value), outline, shown, ink, label_size, title_text))
    if values is not None:
        _add_legend(picture, look)
    return picture


def render_svg(picture: Picture, paper: str = "#ffffff") -> str:
    """Return a picture as a standalone SVG document, on paper of this colour."""
    width, height = f"{picture.width:.0f}", f"{picture.height:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{escape(picture.title)}</title>",
        f'<rect width="100%" height="100%" fill="{paper}"/>',
    ]
    for box in picture.boxes:
        parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
            f'fill="{box.colour}"/>'
        )
    parts.append('<g fill="none" stroke-linecap="round">')
    for edge in picture.edges:
        middle = (edge.y0 + edge.y1) / 2
        parts.append(
            f'<path d="M{edge.x0:.1f} {edge.y0:.1f}C{edge.x0:.1f} {middle:.1f} {edge.x1:.1f} {middle:.1f} '
            f'{edge.x1:.1f} {edge.y1:.1f}" stroke="{edge.colour}" stroke-width="{edge.stroke_width:.2f}"/>'
        )
    parts.append("</g>")
    for node in picture.nodes:
        parts.append(f"<g><title>{escape(node.title)}</title>")
        parts.append(
            f'<circle cx="{node.x:.1f}" cy="{node.y:.1f}" r="{node.radius:.1f}" '
            f'fill="{node.fill}" stroke="{node.outline}"/>'
        )
        if node.label:
            parts.append(
                f'<text x="{node.x:.1f}" y="{node.y:.1f}" font-size="{node.label_size:.1f}" text-anchor="middle" '
                f'dominant-baseline="central" fill="{node.label_colour}">{node.label}</text>'
            )
        parts.append("</g>")
    for text in picture.texts:
        weight = ' font-weight="600"' if text.bold else ""
        parts.append(
            f'<text x="{text.x:.1f}" y="{text.y:.1f}" font-size="{text.size:g}" text-anchor="{text.anchor}" '
            f'dominant-baseline="central" fill="{text.colour}"{weight}>{escape(text.text)}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def render_png(picture: Picture, scale: float) -> bytes:
    """Return a picture as a PNG file, `scale` image pixels to a picture pixel."""
    if scale * max(picture.width, picture.height) > MAX_PNG_PIXELS:
        limit = MAX_PNG_PIXELS / max(picture.width, picture.height)
        rule = f"at most {limit:.3g} for a tree of this size"
        raise ValueError(f"TokenTree.save_png: scale must be {rule}, got {scale:g}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle, PathPatch, Rectangle
        from matplotlib.path import Path
    except ImportError as reason:
        raise ImportError(
            f"TokenTree.save_png: matplotlib is needed to write PNG files ({reason}); "
            "pip install 'sequoia-kernels[plot]', or use save_svg, which needs nothing"
        ) from reason

    points = 0.72  # points to a picture pixel at 100 pixels an inch
    # The object interface keeps out of pyplot's global state.
    figure = Figure(figsize=(picture.width / 100, picture.height / 100), dpi=100 * scale, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)
    for box in picture.boxes:
        axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=box.colour, edgecolor="none"))
    curve = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    for edge in picture.edges:
        middle = (edge.y0 + edge.y1) / 2
        corners = [(edge.x0, edge.y0), (edge.x0, middle), (edge.x1, middle), (edge.x1, edge.y1)]
        style = {"facecolor": "none", "edgecolor": edge.colour, "linewidth": edge.stroke_width * points}
        axes.add_patch(PathPatch(Path(corners, curve), capstyle="round", **style))
    for node in picture.nodes:
        style = {"facecolor": node.fill, "edgecolor": node.outline, "linewidth": points, "zorder": 2}
        axes.add_patch(Circle((node.x, node.y), node.radius, **style))
        if node.label:
            place: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
            axes.text(node.x, node.y, node.label, size=node.label_size * points, color=node.label_colour, **place)
    alignment = {"start": "left", "middle": "center", "end": "right"}
    for text in picture.texts:
        place = {"ha": alignment[text.anchor], "va": "center", "weight": "bold" if text.bold else "normal"}
        axes.text(text.x, text.y, text.text, size=text.size * points, color=text.colour, **place)
    file = io.BytesIO()
    canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def _add_levels(picture: Picture, tree: Shape, values: Sequence[float] | None, width: float, look: Look) -> None:
    """Add a band to every second level, its number on the left and what it holds on the right."""
    right = width - MARGIN
    heading_y = MARGIN + HEADER - 12
    picture.texts.append(Text(MARGIN, heading_y, "level", 11, look.faint_ink))
    picture.texts.append(Text(right, heading_y, "nodes" if values is None else "reached", 11, look.faint_ink, "end"))
    for level in range(tree.num_levels):
        y = MARGIN + HEADER + level * LEVEL_HEIGHT
        if level % 2 == 0:
            picture.boxes.append(Box(MARGIN - 8, y, width - 2 * (MARGIN - 8), LEVEL_HEIGHT, look.guide))
        nodes = tree.level_nodes(level)
        middle = y + LEVEL_HEIGHT / 2
        picture.texts.append(Text(MARGIN, middle, str(level), 12, look.faint_ink))
        if values is None:
            picture.texts.append(Text(right, middle, str(len(nodes)), 12, look.faint_ink, "end"))
            continue
        # Acceptances of siblings exclude one another, so a level's values add up to the probability of reaching it.
        reached = math.fsum(values[node] for node in nodes)
        picture.texts.append(Text(right, middle - 8, _percent(reached), 12, look.ink, "end"))
        picture.texts.append(Text(right, middle + 8, _counted(len(nodes), "node"), 10, look.faint_ink, "end"))


def _add_legend(picture: Picture, look: Look) -> None:
    """Add the colour scale at the lower right."""
    bar_width, bar_height, steps = 180.0, 8.0, 60
    x = picture.width - MARGIN - bar_width
    y = picture.height - MARGIN - 22
    for step in range(steps):
        value = 10.0 ** (VALUE_DECADES * ((step + 0.5) / steps - 1.0))
        # neighbours overlap a little, which hides the seams that renderers leave between them
        step_width = bar_width / steps + (0.5 if step + 1 < steps else 0.0)
        picture.boxes.append(Box(x + step * bar_width / steps, y, step_width, bar_height, look.colour(value)))
    picture.texts.append(Text(x - 10, y + bar_height / 2, look.legend, 11, look.faint_ink, "end"))
    for decade in range(VALUE_DECADES + 1):
        label = f"{10.0 ** (decade - VALUE_DECADES):g}"
        anchor = "start" if decade == 0 else "end" if decade == VALUE_DECADES else "middle"
        picture.texts.append(
            Text(x + decade * bar_width / VALUE_DECADES, y + bar_height + 11, label, 10, look.faint_ink, anchor)
        )


def _headline(tree: Shape, values: Sequence[float] | None) -> str:
    size = f"{_counted(tree.num_nodes, 'node')}, {_counted(tree.num_levels, 'level')}"
    return size if values is None else f"{size}, {math.fsum(values):.2f} tokens per step expected"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _radii(num_nodes: int) -> tuple[float, float]:
    """Return the radius of a node of value 1 and the smallest radius."""
    if num_nodes <= 24:
        return 22.0, 9.0
    if num_nodes <= 96:
        return 18.0, 6.0
    return 16.0, 3.5


def shade(value: float) -> float:
    """Return a value's place on the colour scale, in [0, 1]."""
    return 0.0 if value <= 0.0 else min(1.0, max(0.0, 1.0 + math.log10(value) / VALUE_DECADES))


def _colour(value: float) -> str:
    place = shade(value) * (len(VALUE_COLOURS) - 1)
    lower = min(int(place), len(VALUE_COLOURS) - 2)
    share = place - lower
    ends = zip(VALUE_COLOURS[lower], VALUE_COLOURS[lower + 1], strict=True)
    mixed = (round(low + share * (high - low)) for low, high in ends)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 or value == 0.0 else f"{value:.1e}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"


PAPER = Look(INK, FAINT_INK, GUIDE, _colour, lambda value: "#ffffff" if shade(value) > 0.55 else INK)
