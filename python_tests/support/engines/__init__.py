"""Engines of vLLM in processes of their own, driven from tests."""
