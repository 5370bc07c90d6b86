"""`plan`: choose a tree from an acceptance file and a profile file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import DTYPES, add_command, positive
from sequoia_kernels.cli.terminal import BadUsage, Terminal


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        "Choose a tree from an acceptance or records file and a profile file.",
        "sequoia-kernels plan --profile profile.json --acceptance acceptance.json --out plan.json --svg tree.svg",
    )
    evidence = parser.add_mutually_exclusive_group(required=True)
    evidence.add_argument("--acceptance", type=Path, help="JSON written by `acceptance --out`")
    evidence.add_argument("--records", type=Path, help="steps kept by `acceptance --records`: trees are valued in them")
    parser.add_argument("--profile", type=Path, required=True, help="JSON written by `profile --out`")
    parser.add_argument(
        "--context", type=positive, help="committed tokens to plan for (default: the middle of the measured ones)"
    )
    parser.add_argument("--batch-size", type=positive, default=1, help="requests decoded together")
    parser.add_argument("--max-budget", type=positive, help="largest number of nodes (default: what was measured)")
    parser.add_argument("--max-levels", type=positive, help="largest number of levels (default: 32)")
    parser.add_argument(
        "--rule", help="verification rule to plan for: sequoia (the default with --acceptance) or traversal"
    )
    parser.add_argument(
        "--no-shaped", action="store_true", help="weigh no shaped trees, as plans on a CPU from records do"
    )
    parser.add_argument("--any-device", action="store_true", help="accept a profile of another device")
    models = parser.add_argument_group("models (those of the profile when none is given)")
    models.add_argument(
        "--target-config", type=Path,
        help="config.json or folder of the target: no weights are loaded; needs `profile --microbenchmarks`",
    )  # fmt: skip
    models.add_argument("--draft-config", type=Path, help="the same of the draft")
    models.add_argument("--dtype", choices=DTYPES, help="of models given by a config (default: as the config says)")
    models.add_argument("--offload", action="store_true", help="plan for a target that streams from host memory")
    models.add_argument("--device-memory", metavar="SIZE", help="device memory for it, such as 20GiB")
    parser.add_argument("--out", type=Path, help="write the plan to this JSON file")
    parser.add_argument("--svg", type=Path, help="write a picture of the tree here")


def _config_models(args: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """Read the shapes of the models that the arguments name, (None, None) without any."""
    import torch
    from transformers import AutoConfig

    from sequoia_kernels.offload import memory_plan
    from sequoia_kernels.planner import ModelFingerprint
    from sequoia_kernels.tree import MAX_STEP_ROWS

    has_target, has_draft = args.target_config is not None, args.draft_config is not None
    if has_target != has_draft:
        raise BadUsage("--target-config and --draft-config must be given together")
    if args.offload and not (has_target and args.device_memory is not None):
        raise BadUsage(
            "--offload needs --target-config, --draft-config and --device-memory; "
            "a profile measured with --offload needs none of them"
        )
    if args.device_memory is not None and not args.offload:
        raise BadUsage("--device-memory needs --offload")
    if not has_target:
        return None, None
    target = ModelFingerprint.from_config(args.target_config, args.dtype)
    draft = ModelFingerprint.from_config(args.draft_config, args.dtype)
    if args.offload:
        memory = memory_plan(
            AutoConfig.from_pretrained(args.target_config, trust_remote_code=False),
            device=device, device_memory_budget=args.device_memory, dtype=getattr(torch, target.dtype),
            batch_size=args.batch_size, max_cache_len=(args.context or 4096) + MAX_STEP_ROWS, max_rows=MAX_STEP_ROWS,
        )  # fmt: skip
        target = dataclasses.replace(target, streamed_bytes=memory.streamed_bytes)
    return target, draft


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import AcceptanceEstimate, HardwareProfile, ShapedTree, plan_tree
    from sequoia_kernels.planner import StepRecords

    known = AcceptanceEstimate.load(args.acceptance) if args.records is None else StepRecords.load(args.records)
    acceptance = known.acceptance if isinstance(known, StepRecords) else known
    profile = HardwareProfile.load(args.profile)
    if not args.any_device:
        profile.check_device()
    target, draft = _config_models(args, profile.device.type)
    plan = plan_tree(
        known, profile, target=target, draft=draft, context_len=args.context, batch_size=args.batch_size,
        max_budget=args.max_budget, max_levels=args.max_levels, temperature=acceptance.temperature, rule=args.rule,
        shaped=False if args.no_shaped else None,
    )  # fmt: skip
    if args.out is not None:
        plan.save(args.out)
    # Of a shaped tree one of the many that it may be in a step.
    shown = plan.tree.even() if isinstance(plan.tree, ShapedTree) else plan.tree
    if args.svg is not None:
        shown.save_svg(args.svg, plan.acceptance)

    def show() -> None:
        terminal.out.print(plan.describe())
        if isinstance(plan.tree, ShapedTree):
            terminal.out.print("of its many shapes one, whose levels' children are spread evenly:")
        terminal.out.print(shown.draw(plan.acceptance))

    terminal.result(plan.to_document(), show)
    return 0
