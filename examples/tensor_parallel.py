"""A target that transformers' tensor parallelism splits over processes, with a draft that is whole on each of them.

torchrun --nproc-per-node 2 examples/tensor_parallel.py [target draft]    (paths or ids; without, the demo pair)

Started as it is, without torchrun, it decodes with the whole target.
"""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from sequoia_kernels import generate, optimal_tree
from sequoia_kernels.demo import demo_pair_folder


def main() -> None:
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    names = sys.argv[1:] or [str(demo_pair_folder() / role) for role in ("target", "draft")]
    options = {}
    if num_ranks > 1:
        # By itself transformers would make a group whose ranks wait for one another for two hours.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=5))
        options["distributed_config"] = DistributedConfig(tp_size=num_ranks, tp_plan="auto")
    target = AutoModelForCausalLM.from_pretrained(names[0], dtype=torch.float32, **options).eval()
    draft = AutoModelForCausalLM.from_pretrained(names[1], dtype=torch.float32).to(target.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(names[0])

    # Every rank makes the same calls, with the same prompts.
    prompt = tokenizer("def main(", return_tensors="pt").input_ids.to(target.device)
    tree = optimal_tree([0.7, 0.12, 0.05, 0.03], budget=8)
    for temperature in (0.0, 1.0):
        output = generate(target, draft, prompt, tree=tree, max_new_tokens=24, temperature=temperature)
        if rank == 0:
            print(temperature, f"{output.stats.tokens_per_step:.2f}", repr(output.texts(tokenizer)[0]))
    if num_ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
