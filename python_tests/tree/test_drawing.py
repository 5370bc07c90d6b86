"""Drawings: text, SVG and PNG."""

from __future__ import annotations

import io
import os
import sys
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from support.trees import parents_lists

from sequoia_kernels.tree import TokenTree
from sequoia_kernels.tree.drawing import MAX_TEXT_NODES, Look, make_picture, render_svg
from sequoia_kernels.tree.placement import horizontal_positions

ACCEPTANCE = [0.6, 0.2, 0.1]
SVG = "{http://www.w3.org/2000/svg}"


def test_text():
    tree = TokenTree([-1, 0, 0, 1, 1, 2, 3])
    assert tree.draw() == "\n".join(
        [
            "0",
            "├─ 1  rank 0",
            "│  ├─ 3  rank 0",
            "│  │  └─ 6  rank 0",
            "│  └─ 4  rank 1",
            "└─ 2  rank 1",
            "   └─ 5  rank 0",
        ]
    )
    lines = tree.draw([0.5, 0.01]).splitlines()
    assert lines[0] == "0  value 1.000"
    assert lines[2] == "│  ├─ 3  rank 0  value 0.250"
    assert lines[4] == "│  └─ 4  rank 1  value 0.005"
    assert TokenTree.chain(3).draw([1e-3]).splitlines()[2].endswith("value 1.0e-06")
    assert TokenTree.single().draw() == "0"


def test_text_of_huge_trees_is_refused():
    assert len(TokenTree.chain(MAX_TEXT_NODES).draw().splitlines()) == MAX_TEXT_NODES
    with pytest.raises(ValueError, match=f"a drawn tree must have at most {MAX_TEXT_NODES} nodes, got 4097"):
        TokenTree.chain(MAX_TEXT_NODES + 1).draw()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parents_lists())
def test_layout_keeps_order_and_distance(parents):
    tree = TokenTree(parents)
    half_widths = [3.0 + (node * 7) % 5 for node in range(tree.num_nodes)]
    positions = horizontal_positions(tree, half_widths, sibling_gap=2.0, cousin_gap=4.0)
    for level in range(tree.num_levels):
        nodes = tree.level_nodes(level)
        for left, right in pairwise(nodes):
            free = positions[right] - positions[left] - half_widths[left] - half_widths[right]
            assert free >= 2.0 - 1e-9
    for node in range(tree.num_nodes):
        children = tree.children(node)
        if children:
            middle = (positions[children[0]] + positions[children[-1]]) / 2
            assert abs(positions[node] - middle) < 1e-9
    assert abs(min(x - half for x, half in zip(positions, half_widths, strict=True))) < 1e-9


def test_layout_is_compact():
    # A star packs its leaves side by side; a chain stays on one line.
    star = horizontal_positions(TokenTree.kary(10, 2), [1.0] * 11, 1.0, 5.0)
    assert star == [14.5, *(1.0 + 3.0 * leaf for leaf in range(10))]
    assert horizontal_positions(TokenTree.chain(50), [1.0] * 50, 1.0, 5.0) == [1.0] * 50


@pytest.mark.parametrize("tree", [TokenTree.single(), TokenTree.chain(7), TokenTree.kary(3, 5), TokenTree.kary(255, 2)])
def test_svg_shows_every_node(tree):
    for acceptance in (None, ACCEPTANCE):
        root = ElementTree.fromstring(tree.to_svg(acceptance))
        width, height = float(root.get("width")), float(root.get("height"))
        circles = list(root.iter(f"{SVG}circle"))
        assert len(circles) == tree.num_nodes
        assert len(list(root.iter(f"{SVG}path"))) == tree.num_nodes - 1
        for circle in circles:
            x, y, radius = (float(circle.get(name)) for name in ("cx", "cy", "r"))
            assert radius >= 3.0
            assert radius <= x <= width - radius
            assert radius <= y <= height - radius
        titles = [title.text for title in root.iter(f"{SVG}title")]
        assert len(titles) == tree.num_nodes + 1
        assert titles[0].startswith(f"{tree.num_nodes} node")
    assert "value 1.000" in titles[1]


def test_svg_tells_values():
    tree = TokenTree([-1, 0, 0, 1])
    root = ElementTree.fromstring(tree.to_svg(ACCEPTANCE))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles[0] == "4 nodes, 3 levels, 2.16 tokens per step expected"
    assert "node 3, level 2, rank 0 below node 1, value 0.360" in titles
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "80%" in texts  # level 1 is reached through either child
    radii = [float(circle.get("r")) for circle in root.iter(f"{SVG}circle")]
    assert radii[0] > radii[1] > radii[3] > 0
    assert abs(radii[1] ** 2 / radii[0] ** 2 - 0.6) < 0.01  # the area shows the value
    assert tree.to_svg(ACCEPTANCE) == tree.to_svg(ACCEPTANCE)


def test_extreme_values_can_be_drawn():
    tree = TokenTree.chain(400)
    for acceptance in ([0.0], [1e-300], [1.0]):
        ElementTree.fromstring(tree.to_svg(acceptance))


def test_save_svg(tmp_path):
    tree = TokenTree.kary(2, 4)
    tree.save_svg(tmp_path / "tree.svg", ACCEPTANCE)
    assert (tmp_path / "tree.svg").read_text(encoding="utf-8") == tree.to_svg(ACCEPTANCE)
    assert os.listdir(tmp_path) == ["tree.svg"]


def test_a_look_gives_colours_and_words():
    tree = TokenTree([-1, 0, 0, 1])
    look = Look("ink", "faint", "band", lambda value: f"c{value:g}", lambda value: f"on{value:g}", "the <heading>",
                "the legend", ["100%", "25%", "0%", "5%"], ["a", "b", "c & d", "e"])  # fmt: skip
    picture = make_picture(tree, [1.0, 0.25, 0.0, 0.05], look)
    assert [(node.fill, node.label_colour, node.title) for node in picture.nodes] == [
        ("c1", "on1", "a"), ("c0.25", "on0.25", "b"), ("c0", "on0", "c & d"), ("c0.05", "on0.05", "e"),
    ]  # fmt: skip
    assert [node.label for node in picture.nodes] == ["100%", "25%", "0%", "5%"]
    assert {text.colour for text in picture.texts} == {"ink", "faint"}
    svg = render_svg(picture, paper="none")
    assert "the &lt;heading&gt;" in svg and "the legend" in svg and "<title>c &amp; d</title>" in svg
    assert 'height="100%" fill="none"' in svg and "#" not in svg
    assert (
        make_picture(TokenTree.chain(30), [1.0] * 30, look._replace(labels=["12345678"] * 30, titles=None))
        .nodes[0]
        .label
        == ""
    )


def test_save_png(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    tree = TokenTree.kary(2, 4)
    tree.save_png(tmp_path / "tree.png", ACCEPTANCE, scale=1.0)
    data = (tmp_path / "tree.png").read_bytes()
    pixels = image.imread(io.BytesIO(data))
    picture = make_picture(tree, tree.node_values(ACCEPTANCE))
    assert abs(pixels.shape[1] - picture.width) <= 1
    assert abs(pixels.shape[0] - picture.height) <= 1
    root = picture.nodes[0]
    # just beside the root's number: its fill
    colour = pixels[round(root.y + 0.8 * root.radius), round(root.x)][:3]
    assert "#" + "".join(f"{round(255 * channel):02x}" for channel in colour.tolist()) == root.fill
    tree.save_png(tmp_path / "again.png", ACCEPTANCE, scale=1.0)
    assert (tmp_path / "again.png").read_bytes() == data


def test_png_refusals(tmp_path, monkeypatch):
    path = tmp_path / "tree.png"
    for scale in (0.0, -1.0, 17.0, float("nan")):
        with pytest.raises(ValueError, match=r"TokenTree.save_png: scale must be in \(0, 16\], got"):
            TokenTree.single().save_png(path, scale=scale)
    with pytest.raises(ValueError, match=r"TokenTree.save_png: scale must be at most .* for a tree of this size"):
        TokenTree.chain(2000).save_png(path, scale=2.0)
    with pytest.raises(ValueError, match=r"TokenTree.save_png: acceptance must have a sum of at most 1"):
        TokenTree.single().save_png(path, [0.9, 0.9])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib is needed .* pip install 'sequoia-kernels\[plot\]'"):
        TokenTree.single().save_png(path)
    assert os.listdir(tmp_path) == []
