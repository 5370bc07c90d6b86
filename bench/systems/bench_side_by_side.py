"""Side by side on unmodified Hugging Face models: this package, transformers' own speculation, and economize.

    pip install economize       # Apache-2.0; without it the table says so in its place
    python -m bench.systems.bench_side_by_side --json side_by_side.json --markdown side_by_side_tables.md

Every provider decodes the same held-out prompts in turns, in an order that moves on with every turn. The base is
transformers' plain `generate`. Everybody's settings are chosen on other prompts than those that are timed, for each
temperature and batch; `tree="auto"` learns from the same ones. Each library has its own copy of the models.

At temperature 0 every text is compared with that of plain `generate` on the prompt alone; who differs is timed, and the
number of prompts is told. Who refuses a batch decodes its requests one after the other, and is labelled so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import side_by_side_features
from bench.common.demo import Demo, TrainedPair
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.common.smollm2 import DRAFT, SmolLM2, why_not
from sequoia_kernels import generate
from sequoia_kernels.demo import DemoPair
from sequoia_kernels.documents import write_text
from sequoia_kernels.hf import custom_generate

PAIRS: dict[str, Callable[[Run], TrainedPair]] = {"demo": Demo, "smollm2": SmolLM2}
BASE = "transformers `generate`"
PACKAGES = ("torch", "transformers", "economize", "scikit-learn")
PAD = 0

# What economize has beside what is timed, and why it is not.
NOT_TIMED = {
    "economize: jump, EAGLE-3, Medusa, early exit with a readout": "their parameters must be trained first",
    "economize: MTP heads": "the models of these pairs ship none",
    "economize: dynamic depth, lossy verifiers, pruning, quantising": "the text would not be the target's",
}


class Batch(NamedTuple):
    """Requests of one call, padded on the left."""

    input_ids: torch.Tensor  # [B, longest] int64
    attention_mask: torch.Tensor  # [B, longest] int64

    @classmethod
    def of(cls, prompts: Sequence[torch.Tensor]) -> Batch:
        """Pad prompts of [1, length] each."""
        longest = max(ids.shape[1] for ids in prompts)

        def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
            return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows])

        return cls(padded(prompts, PAD), padded([torch.ones_like(ids) for ids in prompts], 0))

    @property
    def prompts(self) -> list[torch.Tensor]:
        """The requests without padding. [1, length] each."""
        rows = zip(self.input_ids, self.attention_mask.bool(), strict=True)
        return [ids[mask][None] for ids, mask in rows]


class Decoded(NamedTuple):
    """New tokens of each request, and what else there is to say."""

    tokens: list[list[int]]
    note: str = ""


Decode = Callable[[Batch, int], Decoded]  # batch, seed


@dataclass
class Provider:
    """Somebody who decodes: by one of several settings, of which the fastest on the calibration prompts is timed."""

    name: str
    candidates: Mapping[str, Decode]
    ours: bool = False
    reason: str | None = None  # why there is nobody
    seconds: dict[str, float] = field(default_factory=dict)  # of each candidate
    failures: dict[str, str] = field(default_factory=dict)  # of candidates that do not run
    pick: str | None = None
    one_by_one: str | None = None  # why requests of a batch are decoded one after the other
    note: str = ""

    def decode(self, batch: Batch, seed: int) -> list[list[int]]:
        """Decode by the pick."""
        assert self.pick is not None
        decoded = self._run(self.pick, batch, seed)
        self.note = decoded.note
        return decoded.tokens

    def _run(self, candidate: str, batch: Batch, seed: int) -> Decoded:
        run = self.candidates[candidate]
        if self.one_by_one is None:
            return run(batch, seed)
        singles = [run(Batch.of([ids]), seed + row) for row, ids in enumerate(batch.prompts)]
        return Decoded([single.tokens[0] for single in singles], singles[-1].note)

    def calibrate(self, batches: Sequence[Batch], rounds: int, alone: str | None = None) -> None:
        """Choose the fastest candidate; `alone` is the pick for one request, for those who take no more.

        The candidates take turns. Each is run on the first batch beforehand, which is not counted.
        """
        if self.reason is not None:
            return
        for name in self.candidates:
            try:
                self._run(name, batches[0], 0)
                self.seconds[name] = 0.0
            except Exception as error:  # a rival's changed interface must not end the run
                self.failures[name] = _first_line(error)
        if not self.seconds and self.one_by_one is None and alone is not None:
            self.one_by_one, self.pick = next(iter(self.failures.values())), alone
            self.failures = {}
            return
        for turn in range(rounds):
            for seed, batch in enumerate(batches):
                for name in self.seconds:
                    began = time.perf_counter()
                    self._run(name, batch, 1000 * turn + seed)
                    self.seconds[name] += time.perf_counter() - began
        if self.seconds:
            self.pick = min(self.seconds, key=self.seconds.__getitem__)
        else:
            self.reason = next(iter(self.failures.values()))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# ---- the models


def untouched(model: Any) -> Any:
    """A copy with weights of its own that nobody has adapted, without generation settings of the checkpoint's."""
    from transformers import GenerationConfig

    twin = type(model)(copy.deepcopy(model.config)).to(model.dtype).to(model.device).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = GenerationConfig(pad_token_id=PAD)  # nothing ends a text early
    return twin


def without_settings(pair: DemoPair) -> None:
    """Take the checkpoints' generation settings away: every provider decodes as many tokens from the same logits."""
    from transformers import GenerationConfig

    for model in pair[:2]:
        model.generation_config = GenerationConfig(pad_token_id=PAD)


# ---- the providers


def own_providers(pair: DemoPair, temperature: float, new_tokens: int) -> list[Provider]:
    """This package: its plain loop, its call, and transformers' call with it."""
    common = {"max_new_tokens": new_tokens, "temperature": temperature, "eos_token_id": ()}

    def own(draft: Any, **options: Any) -> Decode:
        def decode(batch: Batch, seed: int) -> Decoded:
            output = generate(pair.target, draft, **batch._asdict(), seed=seed, **options, **common)
            return Decoded(output.new_tokens, "" if draft is None else _trees(output.stats))

        return decode

    def by_transformers(batch: Batch, seed: int) -> Decoded:
        output = pair.target.generate(
            **batch._asdict(), **_settings(temperature, new_tokens), custom_generate=custom_generate,
            assistant_model=pair.draft, seed=seed, return_dict_in_generate=True,
        )  # fmt: skip
        return Decoded(output.sequences[:, batch.input_ids.shape[1] :].tolist(), _trees(output.stats))

    return [
        Provider("sequoia-kernels, plain loop", {"no draft": own(None)}, ours=True),
        Provider('sequoia-kernels, `tree="auto"`', {"auto": own(pair.draft, tree="auto")}, ours=True),
        Provider("sequoia-kernels, `custom_generate`", {"auto": by_transformers}, ours=True),
    ]


def _trees(stats: Any) -> str:
    """The tree that most steps were decoded with."""
    if not stats.steps_by_tree:
        return ""
    tree = max(stats.steps_by_tree, key=stats.steps_by_tree.__getitem__)
    return f"{tree.num_nodes} nodes, {tree.num_levels} levels"


def _settings(temperature: float, new_tokens: int) -> dict[str, Any]:
    """What transformers' `generate` is told."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    return {**sampling, "max_new_tokens": new_tokens, "pad_token_id": PAD}


def transformers_providers(pair: DemoPair, temperature: float, new_tokens: int) -> list[Provider]:
    """transformers alone: its loop, which is the base, its assisted generation, its prompt lookup."""
    from transformers import GenerationConfig

    settings = _settings(temperature, new_tokens)

    def plain(schedule: GenerationConfig | None = None, **options: Any) -> Decode:
        def decode(batch: Batch, seed: int) -> Decoded:
            torch.manual_seed(seed)
            if schedule is not None:  # kept from call to call: "heuristic" goes on where it was
                pair.draft.generation_config = schedule
            output = pair.target.generate(**batch._asdict(), **settings, **options)
            return Decoded(output[:, batch.input_ids.shape[1] :].tolist())

        return decode

    def assisted(schedule: str, num_tokens: int, threshold: float) -> Decode:
        config = GenerationConfig(
            num_assistant_tokens=num_tokens, num_assistant_tokens_schedule=schedule,
            assistant_confidence_threshold=threshold, pad_token_id=PAD,
        )  # fmt: skip
        return plain(config, assistant_model=pair.draft)

    return [
        Provider(BASE, {"dynamic cache": plain(), "static cache": plain(cache_implementation="static")}),
        Provider(
            "transformers, assisted",
            {
                **{f"constant, {n} tokens": assisted("constant", n, 0.0) for n in (2, 3, 4, 5, 6, 8)},
                "heuristic from 5 tokens": assisted("heuristic", 5, 0.0),
                "confidence .4, at most 8 tokens": assisted("constant", 8, 0.4),
                "confidence .4, at most 20 tokens (the default)": assisted("constant", 20, 0.4),
            },
        ),
        Provider(
            "transformers, prompt lookup",
            {
                f"{tokens} tokens, n-grams up to {ngram}": plain(
                    prompt_lookup_num_tokens=tokens, max_matching_ngram_size=ngram
                )
                for tokens in (3, 5, 10)
                for ngram in (2, 3)
            },
        ),
    ]


ECONOMIZE = "economize"


def economize_providers(pair: DemoPair, draft_folder: Path, temperature: float, new_tokens: int) -> list[Provider]:
    """economize by its own `decode_batch`, with every drafter of its that needs no training: the best one is timed."""
    if find_spec("economize") is None:
        return [Provider(ECONOMIZE, {}, reason="not installed: pip install economize")]
    import economize
    from economize.decoding import GreedySelector, TopPSampler
    from economize.techniques.draft_model import DraftModelConfig
    from economize.techniques.early_exit import EarlyExitConfig
    from economize.techniques.hybrid import HybridConfig
    from economize.techniques.layer_skip import LayerSkipConfig
    from economize.techniques.lookup import LookupConfig

    layers = pair.target.config.get_text_config(decoder=True).num_hidden_layers
    second = DraftModelConfig(model=str(draft_folder))
    verifier = "rejection" if temperature else "greedy"
    candidates: dict[str, Decode] = {}
    failures: dict[str, str] = {}

    def add(name: str, cycles: Sequence[int], config: Callable[[], Any], **options: Any) -> None:
        """One drafter with several lengths of its chains."""
        try:
            model = economize.apply(untouched(pair.target), config())
        except Exception as error:  # its own refusal is the text of the table
            failures[name] = _first_line(error)
            return
        for cycle in cycles:
            decoding = economize.DecodeConfig(cycle_length=cycle, verifier=verifier, **options)

            def decode(batch: Batch, seed: int, decoding: Any = decoding) -> Decoded:
                selector = TopPSampler(temperature, seed=seed) if temperature else GreedySelector()
                prompts = [ids[0] for ids in batch.prompts]
                results = model.decode_batch(prompts, new_tokens, decoding=decoding, selector=selector)
                return Decoded([result.tokens.view(-1).tolist() for result in results])

            candidates[f"{name}, cycles of {cycle}"] = decode

    add("second model", (3, 4, 6, 8), lambda: second)
    add("second model, confidence .4", (8,), lambda: second, min_confidence=0.4)
    add("lookup", (4, 6, 10), lambda: LookupConfig())
    add("lookup of the latest", (6,), lambda: LookupConfig(match="latest"))
    add("lookup, else second model", (4, 6, 8), lambda: HybridConfig(fallback=second))
    if layers > 2:
        exit_layer, skipped = max(1, layers // 4), max(1, layers // 3)
        add(f"early exit behind layer {exit_layer}", (3,), lambda: EarlyExitConfig(exit_layer, head="shared"))
        add(f"{skipped} layers skipped", (3,), lambda: LayerSkipConfig(num_skip=skipped, search="uniform"))
    provider = Provider(ECONOMIZE, candidates, failures=failures)
    if not candidates:
        provider.reason = next(iter(failures.values()))
    return [provider]


def economize_generate(pair: DemoPair, prompt: torch.Tensor) -> str | None:
    """Why economize's `generate` does not run beside this transformers; None where it runs or is not there."""
    if find_spec("economize") is None:
        return None
    import economize
    from economize.techniques.lookup import LookupConfig

    try:
        model = economize.apply(untouched(pair.target), LookupConfig())
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
    except Exception as error:  # what it says is what is asked for
        return _first_line(error)
    return None


# ---- the measurement


def greedy_texts(pair: DemoPair, prompts: Sequence[torch.Tensor], new_tokens: int) -> list[list[int]]:
    """What plain transformers writes behind each prompt alone: what everybody's greedy text must be."""
    settings = _settings(0.0, new_tokens)
    return [
        pair.target.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
        for ids in prompts
    ]


def batches_of(prompts: Sequence[torch.Tensor], size: int) -> list[Batch]:
    """Batches of that many prompts each."""
    return [Batch.of(prompts[first : first + size]) for first in range(0, len(prompts), size)]


def take_rounds(
    providers: Sequence[Provider], batches: Sequence[Batch], rounds: int, wanted: Sequence[list[int]] | None
) -> dict[str, dict[str, Any]]:
    """Time everybody in turns: seconds and tokens of each round, and how many prompts had another text than wanted."""
    found = {
        provider.name: {"seconds": [0.0] * rounds, "tokens": [0] * rounds, "differing": set()} for provider in providers
    }
    first = 0
    for turn in range(rounds):
        row = 0
        for index, batch in enumerate(batches):
            order = [*providers[first:], *providers[:first]]
            first = (first + 1) % len(providers)
            for provider in order:
                entry = found[provider.name]
                began = time.perf_counter()
                tokens = provider.decode(batch, 100_000 * (turn + 1) + 100 * index)
                entry["seconds"][turn] += time.perf_counter() - began
                entry["tokens"][turn] += sum(map(len, tokens))
                if wanted is not None:
                    entry["differing"] |= {row + n for n, text in enumerate(tokens) if text != wanted[row + n]}
            row += len(batch.input_ids)
    return found


def measure_case(
    providers: Sequence[Provider],
    calibration: Sequence[Batch],
    batches: Sequence[Batch],
    options: argparse.Namespace,
    wanted: Sequence[list[int]] | None,
    alone: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Calibrate and time the providers at one temperature and batch. Entries by provider."""  # fmt: skip
    for provider in providers:
        provider.calibrate(calibration, options.calibration_rounds, alone.get(provider.name))
    able = [provider for provider in providers if provider.pick is not None]
    found = take_rounds(able, batches, options.rounds, wanted)
    base = found.get(BASE)
    entries: dict[str, dict[str, Any]] = {}
    for provider in providers:
        entry = entries[provider.name] = {"ours": provider.ours}
        if provider.failures:
            entry["settings_that_failed"] = provider.failures
        if provider.pick is None:
            entry |= {"status": "skipped", "reason": provider.reason or "nothing to time"}
            continue
        taken = found[provider.name]
        rates = [tokens / seconds for tokens, seconds in zip(taken["tokens"], taken["seconds"], strict=True)]
        entry |= {
            "status": "ok",
            "settings": provider.pick,
            "note": provider.note,
            "calibration_seconds": provider.seconds,
            "one_by_one": provider.one_by_one,
            "tokens_per_second": statistics.median(rates),
            "rates": rates,
            "differing_prompts": None if wanted is None else len(taken["differing"]),
        }
        if base is not None:
            base_rates = [tokens / seconds for tokens, seconds in zip(base["tokens"], base["seconds"], strict=True)]
            entry["over_base"] = statistics.median(a / b for a, b in zip(rates, base_rates, strict=True))
    return entries


@contextmanager
def saved(draft: Any, tokenizer: Any) -> Iterator[Path]:
    """A folder with the draft, for who takes it from a folder only."""
    with tempfile.TemporaryDirectory() as folder:
        draft.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield Path(folder)


def measure(bench: Run) -> int:
    options, document = bench.options, bench.document
    trained = PAIRS[options.pair](bench)
    calibration, prompts = trained.prompts(options)
    own = trained.pair
    others, rivals = (DemoPair(untouched(own.target), untouched(own.draft), own.tokenizer) for _ in range(2))
    without_settings(own)
    document |= {name: getattr(options, name) for name in ("pair", "new_tokens", "rounds", "calibration_rounds")}
    document |= {"dtype": "float32", "base": BASE, "num_prompts": len(prompts), "calibration_prompts": len(calibration)}
    document["prompt_tokens"] = [ids.shape[1] for ids in prompts]
    document["packages"] = {name: version_of(name) for name in PACKAGES}
    document["not_timed"] = NOT_TIMED
    document["features"] = side_by_side_features.document()
    document["economize_generate"] = economize_generate(rivals, prompts[0])
    results = document["results"] = []
    wanted = greedy_texts(others, prompts, options.new_tokens)
    failed = False
    with saved(others.draft, others.tokenizer) as folder:
        for temperature in options.temperatures:
            alone: dict[str, str] = {}
            for size in sorted(options.batches):
                bench.tell(f"temperature {temperature:g}, batch {size}")
                providers = [
                    *transformers_providers(others, temperature, options.new_tokens),
                    *own_providers(own, temperature, options.new_tokens),
                    *economize_providers(rivals, folder, temperature, options.new_tokens),
                ]
                entries = measure_case(
                    providers, batches_of(calibration, size), batches_of(prompts, size), options,
                    None if temperature else wanted, alone,
                )  # fmt: skip
                if size == 1:
                    alone = {provider.name: provider.pick for provider in providers if provider.pick is not None}
                results.append({"temperature": temperature, "batch_size": size, "providers": entries})
                failed |= any(entry["ours"] and entry["status"] != "ok" for entry in entries.values())
                bench.save()
    text = markdown(document)
    print(text)
    if options.markdown is not None:
        write_text(options.markdown, text)
    return 1 if failed else 0


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the tables


def markdown(document: Mapping[str, Any]) -> str:
    """What was measured, what was chosen, what the libraries offer."""
    results = document["results"]
    names = list(dict.fromkeys(name for result in results for name in result["providers"]))
    header = ["tokens/s (over the base)"]
    header += [f"T = {result['temperature']:g}, batch {result['batch_size']}" for result in results]
    sizes = sorted({result["batch_size"] for result in results if result["temperature"] == 0})
    header += [f"texts that differ, batch {size}" for size in sizes]
    rows = []
    for name in names:
        row = [f"{name} (the base)" if name == document["base"] else name]
        row += [_cell(result["providers"].get(name)) for result in results]
        for size in sizes:
            entries = [
                result["providers"].get(name, {})
                for result in results
                if result["temperature"] == 0 and result["batch_size"] == size
            ]
            differing = [entry["differing_prompts"] for entry in entries if "differing_prompts" in entry]
            row.append(f"{max(differing)} of {document['num_prompts']}" if differing else "-")
        rows.append(row)
    parts = [table(header, rows)]
    if any(entry.get("one_by_one") for result in results for entry in result["providers"].values()):
        parts.append("* refuses batches: its requests were decoded one after the other.")
    parts.append(_chosen(document, names))
    remarks = [f"- {text}" for text in _remarks(document)]
    if remarks:
        parts.append("\n".join(remarks))
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items() if version)
    parts.append(f"{versions}; commit {document['commit']}; `{document['command']}`")
    parts.append(side_by_side_features.markdown())
    return "\n\n".join(parts) + "\n"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["status"] != "ok":
        return "-"
    ratio = f" ({entry['over_base']:.2f}x)" if "over_base" in entry else ""
    return f"{entry['tokens_per_second']:.1f}{ratio}{' *' if entry['one_by_one'] else ''}"


def _chosen(document: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings that were timed."""
    results = document["results"]
    header = ["chosen", *(f"T = {result['temperature']:g}, batch {result['batch_size']}" for result in results)]
    rows = []
    for name in names:
        row = [name]
        for result in results:
            entry = result["providers"].get(name, {})
            row.append(entry.get("note") or entry.get("settings") or "-")
        rows.append(row)
    return table(header, rows, left=len(header))


def _remarks(document: Mapping[str, Any]) -> list[str]:
    """What did not run, with the reason, each once."""
    found: dict[str, None] = {}
    for result in document["results"]:
        for name, entry in result["providers"].items():
            if entry["status"] != "ok":
                found[f"{name}: {entry['reason']}"] = None
            if entry.get("one_by_one"):
                found[f"{name}, batches: {entry['one_by_one']}"] = None
            for setting, reason in entry.get("settings_that_failed", {}).items():
                found[f"{name}, {setting}: {reason}"] = None
    if document["economize_generate"]:
        found[f"economize, `generate`: {document['economize_generate']}; timed by `decode_batch`"] = None
    if document["packages"]["economize"]:
        for what, reason in document["not_timed"].items():
            found[f"{what}: not timed, {reason}"] = None
    return list(found)


OPTIONS = [
    *shared(threads=1, quick=False, temperatures=[0.0, 1.0], prompts=12, calibration_prompts=4),
    *shared(rounds=3, prompt_tokens=128, new_tokens=128),
    option("--batches", type=int, nargs="+", default=[1, 4], help="requests of a call (default %(default)s)"),
    option("--calibration-rounds", type=int, default=1, help="times that settings are compared (default %(default)s)"),
    option("--pair", choices=tuple(PAIRS), default="demo", help="default %(default)s"),
    option("--draft", type=Path, default=DRAFT, help="of smollm2: a model folder (default build/drafts/smollm2)"),
    option("--markdown", type=Path, metavar="FILE", help="write the tables here"),
]
QUICK = {"temperatures": [0.0], "prompts": 2, "calibration_prompts": 2, "rounds": 1, "calibration_rounds": 1}
QUICK |= {"prompt_tokens": 48, "new_tokens": 16, "batches": [1, 2]}


def problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    for name in ("prompts", "calibration_prompts"):
        count = getattr(options, name)
        if count < 1 or any(size < 1 or count % size for size in options.batches):
            wanted = ", ".join(map(str, options.batches))
            return f"--{name.replace('_', '-')} must be a multiple of every batch ({wanted}), got {count}"
    for name in ("rounds", "calibration_rounds"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
    return why_not(options) if options.pair == "smollm2" else None


main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, markdown=markdown, check=problem).main


if __name__ == "__main__":
    sys.exit(main())
