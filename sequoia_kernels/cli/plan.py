"""`plan`: choose a tree from an acceptance file and a profile file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import DTYPES, add_command, positive
from sequoia_kernels.cli.terminal import BadUsage, Terminal


def add(commands: Any) -> None:
    parser = add_command(commands, "plan", run, "Choose a tree from an acceptance file and a profile file.")
    parser.add_argument("--acceptance", type=Path, required=True, help="JSON written by `acceptance --out`")
    parser.add_argument("--profile", type=Path, required=True, help="JSON written by `profile --out`")
    parser.add_argument("--context", type=positive, default=argparse.SUPPRESS, help="committed tokens to plan for")
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--max-budget", type=positive, default=argparse.SUPPRESS, help="largest number of nodes")
    parser.add_argument("--max-levels", type=positive, default=argparse.SUPPRESS, help="largest number of levels")
    parser.add_argument("--rule", default="sequoia", help="verification rule to plan for")
    parser.add_argument("--any-device", action="store_true", help="accept a profile of another device")
    models = parser.add_argument_group("models (those of the profile when none is given)")
    models.add_argument(
        "--target-config",
        type=Path,
        default=argparse.SUPPRESS,
        help="config.json or folder of the target: no weights are loaded; needs `profile --microbenchmarks`",
    )
    models.add_argument("--draft-config", type=Path, default=argparse.SUPPRESS, help="the same of the draft")
    models.add_argument(
        "--dtype",
        choices=DTYPES,
        default=argparse.SUPPRESS,
        help="of models given by a config (default: as the config says)",
    )
    models.add_argument("--offload", action="store_true", help="plan for a target that streams from host memory")
    models.add_argument(
        "--device-memory", metavar="SIZE", default=argparse.SUPPRESS, help="device memory for it, such as 20GiB"
    )
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="write the plan to this JSON file")
    parser.add_argument("--svg", type=Path, default=argparse.SUPPRESS, help="write a picture of the tree here")


def _config_models(args: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """Read the shapes of the models that the arguments name, (None, None) without any."""
    import torch
    from transformers import AutoConfig

    from sequoia_kernels.offload import memory_plan
    from sequoia_kernels.planner import ModelFingerprint
    from sequoia_kernels.tree import MAX_STEP_ROWS

    has_target, has_draft = hasattr(args, "target_config"), hasattr(args, "draft_config")
    if has_target != has_draft:
        raise BadUsage("--target-config and --draft-config must be given together")
    if args.offload and not (has_target and hasattr(args, "device_memory")):
        raise BadUsage(
            "--offload needs --target-config, --draft-config and --device-memory; "
            "a profile measured with --offload needs none of them"
        )
    if hasattr(args, "device_memory") and not args.offload:
        raise BadUsage("--device-memory needs --offload")
    if not has_target:
        return None, None
    dtype = getattr(args, "dtype", None)
    target = ModelFingerprint.from_config(args.target_config, dtype)
    draft = ModelFingerprint.from_config(args.draft_config, dtype)
    if args.offload:
        memory = memory_plan(
            AutoConfig.from_pretrained(args.target_config, trust_remote_code=False),
            device=device,
            device_memory_budget=args.device_memory,
            dtype=getattr(torch, target.dtype),
            batch_size=args.batch_size,
            max_cache_len=getattr(args, "context", 4096) + MAX_STEP_ROWS,
            max_rows=MAX_STEP_ROWS,
        )
        target = dataclasses.replace(target, streamed_bytes=memory.streamed_bytes)
    return target, draft


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import AcceptanceEstimate, HardwareProfile, plan_tree

    acceptance = AcceptanceEstimate.load(args.acceptance)
    profile = HardwareProfile.load(args.profile)
    if not args.any_device:
        profile.check_device()
    target, draft = _config_models(args, profile.device.type)
    plan = plan_tree(
        acceptance, profile, target=target, draft=draft,
        context_len=getattr(args, "context", None), batch_size=args.batch_size,
        max_budget=getattr(args, "max_budget", None), max_levels=getattr(args, "max_levels", None),
        temperature=acceptance.temperature, rule=args.rule,
    )  # fmt: skip
    if hasattr(args, "out"):
        plan.save(args.out)
    if hasattr(args, "svg"):
        plan.tree.save_svg(args.svg, plan.acceptance)

    def show() -> None:
        terminal.out.print(plan.describe())
        terminal.out.print(plan.tree.draw(plan.acceptance))

    terminal.result(json.loads(plan.to_json()), show)
    return 0
