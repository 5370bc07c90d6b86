"""Planner: which tree to speculate with."""

from sequoia_kernels.planner.search import LevelWidths, OptimalTrees, optimal_tree, optimal_values

__all__ = ["LevelWidths", "OptimalTrees", "optimal_tree", "optimal_values"]
