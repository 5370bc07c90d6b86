"""llama.cpp: its library, driven call by call as its own examples drive it.

llama-cpp-python's own loop copies and sorts logits in Python, which would be most of a small model's time; here tokens
are sampled by the library's samplers. A draft proposes its most probable tokens, and a proposed token stands where the
target's sample is the same one, as in the library's speculative example: exact at every temperature.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.runtimes.base import DRAFT, Pair, Request, Runtime, Tokens

FILE_NAME = "model.gguf"
GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}  # enum ggml_type
KEYS_AND_VALUES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "float16",
}  # the library's default for halves
CONTEXT = 1024  # tokens of a request, at most
BATCH_ROWS = 2048


def save_gguf(model: Any, path: Path) -> None:
    """Write a `LlamaForCausalLM` as GGUF, matrices in the model's dtype, without a vocabulary's words."""
    import gguf

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def add(name: str, weight: torch.Tensor) -> None:
        weight = weight.detach().contiguous()
        if weight.dim() == 1 or weight.dtype == torch.float32:
            writer.add_tensor(f"{name}.weight", weight.float().numpy())
        else:
            kind = gguf.GGMLQuantizationType(GGML_TYPES[str(weight.dtype).removeprefix("torch.")])
            writer.add_tensor(f"{name}.weight", weight.view(torch.uint8).numpy(), raw_dtype=kind)

    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    add("token_embd", embedding)
    if head is not embedding:
        add("output", head)
    add("output_norm", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        attention, gated = layer.self_attn, layer.mlp
        add(f"blk.{index}.attn_norm", layer.input_layernorm.weight)
        add(f"blk.{index}.attn_q", interleaved(attention.q_proj.weight, heads))
        add(f"blk.{index}.attn_k", interleaved(attention.k_proj.weight, kv_heads))
        add(f"blk.{index}.attn_v", attention.v_proj.weight)
        add(f"blk.{index}.attn_output", attention.o_proj.weight)
        add(f"blk.{index}.ffn_norm", layer.post_attention_layernorm.weight)
        add(f"blk.{index}.ffn_gate", gated.gate_proj.weight)
        add(f"blk.{index}.ffn_up", gated.up_proj.weight)
        add(f"blk.{index}.ffn_down", gated.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head in the order in which the library rotates them: (0, 1), (2, 3), ... in place of halves."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


class Context:
    """A model's cache of several sequences, and a batch to fill."""

    def __init__(self, library: Any, model: Any, sequences: int, threads: int, kind: int) -> None:
        self.library = library
        parameters = library.llama_context_default_params()
        parameters.n_ctx = CONTEXT * sequences
        parameters.n_batch = parameters.n_ubatch = BATCH_ROWS
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = kind
        parameters.no_perf = True
        self.context = library.llama_init_from_model(model, parameters)
        if not self.context:
            raise RuntimeError("llama_init_from_model gave no context")
        self.memory = library.llama_get_memory(self.context)
        self.batch = library.llama_batch_init(BATCH_ROWS, 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        self.library.llama_memory_clear(self.memory, False)

    def forget(self, start: int) -> None:
        """Forget the first sequence from a position on."""
        self.library.llama_memory_seq_rm(self.memory, 0, start, -1)

    def feed(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        batch.n_tokens = len(rows)
        status = self.library.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")


class LlamaCppLoop(Runtime):
    """`llama_decode` and the library's samplers."""

    modules = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # noqa: RUF012

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        import llama_cpp

        super().__init__(pair, threads, folder)
        root = self.converted("llama.cpp", lambda role, folder: save_gguf(pair.load(role), folder / FILE_NAME))
        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        self.models = {}
        for role in pair.roles():
            parameters = llama_cpp.llama_model_default_params()
            path = str(root / role / FILE_NAME).encode()
            self.models[role] = llama_cpp.llama_model_load_from_file(path, parameters)
            if not self.models[role]:
                raise RuntimeError(f"llama_model_load_from_file refused the {role}")
        self.kind = GGML_TYPES[KEYS_AND_VALUES[pair.dtype]]
        self.contexts: dict[tuple[str, int], Context] = {}
        self.greedy = self._sampler(0.0, 0)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"keys and values": KEYS_AND_VALUES[self.pair.dtype]}

    def _sampler(self, temperature: float, seed: int) -> Any:
        library = self.library
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        if temperature > 0:
            library.llama_sampler_chain_add(chain, library.llama_sampler_init_temp(temperature))
            library.llama_sampler_chain_add(chain, library.llama_sampler_init_dist(seed))
        else:
            library.llama_sampler_chain_add(chain, library.llama_sampler_init_greedy())
        return chain

    def _context(self, role: str, sequences: int) -> Context:
        if (role, sequences) not in self.contexts:
            arguments = (self.library, self.models[role], sequences, self.threads, self.kind)
            self.contexts[role, sequences] = Context(*arguments)
        context = self.contexts[role, sequences]
        context.clear()
        return context

    def decode(self, request: Request) -> Tokens:
        samplers = [self._sampler(request.temperature, request.seed + index) for index in range(len(request.prompts))]
        try:
            if request.mode == DRAFT:
                return [self._with_draft(request, samplers[0])]
            return self._plain(request, samplers)
        finally:
            for sampler in samplers:
                self.library.llama_sampler_free(sampler)

    def _plain(self, request: Request, samplers: Sequence[Any]) -> Tokens:
        sample = self.library.llama_sampler_sample
        target = self._context("target", len(request.prompts))
        length = len(request.prompts[0])
        target.feed(
            [
                (token, position, sequence, position == length - 1)
                for sequence, prompt in enumerate(request.prompts)
                for position, token in enumerate(prompt)
            ]
        )
        rows = [length * (sequence + 1) - 1 for sequence in range(len(request.prompts))]
        texts: Tokens = [[] for _ in request.prompts]
        for position in itertools.count(length):
            for text, sampler, row in zip(texts, samplers, rows):
                text.append(sample(sampler, target.context, row))
            if len(texts[0]) == request.num_tokens:
                return texts
            target.feed([(text[-1], position, sequence, True) for sequence, text in enumerate(texts)])
            rows = list(range(len(texts)))
        raise AssertionError

    def _with_draft(self, request: Request, sampler: Any) -> list[int]:
        sample = self.library.llama_sampler_sample
        (prompt,) = request.prompts
        target, draft = self._context("target", 1), self._context("draft", 1)
        last = len(prompt) - 1
        target.feed([(token, position, 0, position == last) for position, token in enumerate(prompt)])
        draft.feed([(token, position, 0, False) for position, token in enumerate(prompt[:-1])])
        text = [*prompt, sample(sampler, target.context, last)]
        seen = last  # tokens of the text in the draft's cache
        end = len(prompt) + request.num_tokens
        while len(text) < end:
            known = len(text)
            proposed: list[int] = []
            for _ in range(min(request.draft_tokens, end - known - 1)):
                new = (text + proposed)[seen:]
                draft.feed([(token, seen + index, 0, index == len(new) - 1) for index, token in enumerate(new)])
                seen += len(new)
                proposed.append(sample(self.greedy, draft.context, len(new) - 1))
            fed = [text[-1], *proposed]
            target.feed([(token, known - 1 + index, 0, True) for index, token in enumerate(fed)])
            for row in range(len(fed)):
                text.append(sample(sampler, target.context, row))
                if row < len(proposed) and text[-1] != proposed[row]:
                    break
            target.forget(len(text) - 1)
            seen = min(seen, len(text) - 1)
            draft.forget(seen)
        return text[len(prompt) :]
