"""Statistics of a generation: what was accepted, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from sequoia_kernels.planner.evidence import visits_by_rank
from sequoia_kernels.tree import LookupTree, MergedTree, ShapedTree, TokenTree


@dataclass
class GenerateStats:
    """Counts and times of one `generate` call.

    Attributes:
        num_steps: decoding steps of the batch (target forwards behind the prefill).
        request_steps: steps in which each request was active. [B]
        new_tokens: tokens emitted for each request, the prefill's first one included. [B]
        tokens_per_step: mean accepted tokens per step and request, bonus token included; 1 means no speculation.
            Counted before a step's tokens are cut at an end (EOS, max_new_tokens, stop string).
        accepted_histogram: entry n counts the steps that accepted n tokens, bonus token included.
        visited_by_rank: entry k counts the visited nodes that had a child k and had rejected children 0..k-1.
        accepted_by_rank: entry k counts those whose child k was accepted. The two give the acceptance vector.
        last_nodes: the last node that each step of a request accepted, in the order of the steps: with the tree its
            path, whose length is the node's level + 1. [B][steps of the request]
        seconds: wall time of the call.
        decode_seconds: wall time behind the prefill.
        stage_seconds: wall time by stage, for synchronous devices (CPU); empty elsewhere.
        tree: the tree asked for; with an adaptive plan the last one used; None where each request has its own. Steps
            with a shaped tree or one around a proposed path are not counted by rank.
        steps_by_tree: steps decoded with each tree: in the order of first use.
        lookup_steps: steps that decoded with proposals from the requests' own texts.
        copied_tokens: tokens that were accepted as proposed there.
        draft_restarts: how often the draft had used up its positions and went on with a request's newest tokens only.
    """

    num_steps: int = 0
    request_steps: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    accepted_histogram: list[int] = field(default_factory=list)
    visited_by_rank: list[int] = field(default_factory=list)
    accepted_by_rank: list[int] = field(default_factory=list)
    last_nodes: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    decode_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    tree: TokenTree | ShapedTree | None = None
    steps_by_tree: dict[TokenTree | ShapedTree, int] = field(default_factory=dict)
    lookup_steps: int = 0
    copied_tokens: int = 0
    draft_restarts: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted tokens per step and request, bonus token included."""
        steps = sum(self.accepted_histogram)
        return sum(n * count for n, count in enumerate(self.accepted_histogram)) / steps if steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests over the wall time behind the prefill (the prefill's own tokens not counted)."""
        decoded = sum(max(count - 1, 0) for count in self.new_tokens)
        return decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def overhead_fraction(self) -> float:
        """Share of the decoding time spent outside the two models' forwards; 0 where stages are not timed."""
        forwards = self.stage_seconds.get("draft", 0.0) + self.stage_seconds.get("target", 0.0)
        return 1.0 - forwards / self.decode_seconds if self.stage_seconds and self.decode_seconds > 0 else 0.0

    def count_path(
        self, tree: TokenTree | ShapedTree, nodes: list[int], num_accepted: int
    ) -> tuple[list[int], list[int]]:
        """Count one request's accepted path, `nodes[:num_accepted]`; give what it adds to both counts by rank."""
        while len(self.accepted_histogram) <= num_accepted:
            self.accepted_histogram.append(0)
        self.accepted_histogram[num_accepted] += 1
        if isinstance(tree, (ShapedTree, LookupTree, MergedTree)):  # whose ranks stayed on the device, or are no draws
            return [], []
        visited, accepted = visits_by_rank(tree, nodes, num_accepted)
        for total, part in ((self.visited_by_rank, visited), (self.accepted_by_rank, accepted)):
            total.extend([0] * (len(part) - len(total)))
            for rank, count in enumerate(part):
                total[rank] += count
        return visited, accepted

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain JSON values."""
        trees = ("tree", "steps_by_tree")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in trees}
        values["tree"] = None
        if isinstance(self.tree, ShapedTree):
            values["tree"] = {"widths": list(self.tree.widths)}
        elif self.tree is not None:
            values["tree"] = list(self.tree.parents)
        values["steps_by_tree"] = [
            {"nodes": tree.num_nodes, "levels": tree.num_levels, "steps": steps}
            for tree, steps in self.steps_by_tree.items()
        ]
        derived = ("tokens_per_step", "tokens_per_second", "overhead_fraction")
        return values | {name: getattr(self, name) for name in derived}
