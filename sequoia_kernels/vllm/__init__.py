"""Token trees in vLLM: its scheduler, pages, prefix cache, batches, server and ranks, with lossless trees; no fork.

    from vllm import LLM
    from sequoia_kernels.vllm import engine_args

    llm = LLM("path/or/id/of/target", **engine_args("path/or/id/of/draft"))

`server_flags` gives the same for vLLM's server. Nothing here is active unless an engine is asked for with these
arguments: installing the package changes no other engine. See docs/serving.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from sequoia_kernels.tree import DEFAULT_RULE, TokenTree
from sequoia_kernels.vllm.settings import CONFIG_KEY, WHERE, TreeSettings, trees_from
from sequoia_kernels.vllm.support import (
    TESTED_VERSIONS,
    InstalledVllm,
    check_cuda_version,
    check_version,
    installed_vllm,
    runs_on_cuda,
)

__all__ = ["TESTED_VERSIONS", "InstalledVllm", "engine_args", "installed_vllm", "register", "server_flags"]

BACKEND = "sequoia_kernels.vllm.attention.TreeAttentionBackend"
CUDA_BACKEND = "sequoia_kernels.vllm.gpu_attention.DeviceTreeBackend"
PROPOSER = "sequoia_kernels.vllm.runner.TreeProposer"
WORKER = "sequoia_kernels.vllm.runner.TreeWorker"


def register() -> None:
    """Offer the attention backend to vLLM as CUSTOM; the entry point that vLLM calls in each of its processes.

    Does nothing beside a vLLM that it was not tested with. Safe to call twice.
    """
    if installed_vllm().reason is not None:
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND if runs_on_cuda() else BACKEND)


def engine_args(
    draft: str | os.PathLike[str],
    *,
    tree: str | TokenTree | Sequence[Any] | os.PathLike[str] = "auto",
    max_nodes: int = 16,
    rule: str = DEFAULT_RULE,
    draft_dtype: str | None = None,
    draft_cache_tokens: int | None = None,
    profile_seconds: float = 3.0,
    check_ranks: bool = False,
) -> dict[str, Any]:
    """Give the arguments of a vLLM engine that decodes trees, for `LLM(model, **engine_args(draft), ...)`.

    Args:
        draft: folder or hub id of a smaller model of the same tokenizer.
        tree: "auto" chooses in every step among trees and none by the number of running requests, measured costs and
            what was accepted; several trees limit the choice to these and none. One tree is taken whatever the load:
            a `TokenTree`, its parents (-1 for the root), or a file of one or of a plan.
        max_nodes: nodes of the largest tree of "auto".
        rule: verification rule, "sequoia" or "traversal".
        draft_dtype: dtype to load the draft in; the target's unless given.
        draft_cache_tokens: tokens that the draft's own pages hold, all running requests together; as many as vLLM's
            cache unless given. A request that finds no page there decodes without trees.
        profile_seconds: how long steps are timed at start, at most, where a tree is chosen by load.
        check_ranks: with several ranks, compare in every step what they would have decided; for debugging.

    Returns:
        Keyword arguments: `worker_cls`, `speculative_config`, `additional_config`; on CUDA `attention_backend`, too.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        FileNotFoundError: a path of no folder, or of one that holds no model; a tree's file that does not exist.
        RuntimeError: the vLLM beside the package is none that this was tested with.

    Notes:
        Sampled requests with a seed of their own decode with one tree whatever the load, so that their text does not
        depend on the company: the first of several trees.
    """
    from sequoia_kernels.models.loading import local_folder  # late: every process of vLLM imports this module

    check_version()
    if not isinstance(draft, (str, os.PathLike)) or not os.fspath(draft):
        raise TypeError(f"{WHERE}: draft must be a folder or a hub id, got {draft!r}")
    folder = local_folder(draft, WHERE, "draft")
    trees, by_load = trees_from(tree, max_nodes)
    settings = TreeSettings(
        draft=os.fspath(draft) if folder is None else str(folder.absolute()),
        trees=trees,
        by_load=by_load,
        rule=rule,
        draft_dtype=draft_dtype,
        draft_cache_tokens=draft_cache_tokens,
        profile_seconds=profile_seconds,
        check_ranks=check_ranks,
    )
    settings.check()
    of_platform = {}
    if runs_on_cuda():
        check_cuda_version()
        of_platform["attention_backend"] = "CUSTOM"
    return {
        "worker_cls": WORKER,
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSER,
            "num_speculative_tokens": settings.max_nodes - 1,  # vLLM counts the root itself: the last sampled token
        },
        "additional_config": {CONFIG_KEY: settings.to_dict()},
        **of_platform,
    }


def server_flags(draft: str | os.PathLike[str], **settings: Any) -> list[str]:
    """Give the same as `engine_args`, as flags of `python -m vllm.entrypoints.openai.api_server`.

    Args:
        draft: as for `engine_args`.
        settings: likewise.

    Returns:
        The flags, to be quoted where a shell reads them.
    """
    arguments = engine_args(draft, **settings)
    return [
        word
        for name, value in arguments.items()
        for word in ("--" + name.replace("_", "-"), value if isinstance(value, str) else json.dumps(value))
    ]
