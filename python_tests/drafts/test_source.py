"""The door for drafts, with a source that runs no model: a table of which token follows which."""

from __future__ import annotations

import pytest
import torch
from support.chi_square import p_value, sequence_counts
from support.tiny_models import noisy_copy, sequence_probabilities, tiny_llama

from sequoia_kernels import TokenTree, adapt, generate, measure_profile
from sequoia_kernels.decoding import auto
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.drafts import Drafting, DraftSource, ModelDraft, StageClock, draft_source
from sequoia_kernels.models.attention import attend_along_tree

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])


class Bigrams(DraftSource):
    """Logits of the next token from the last one alone; and a diary of what it was told."""

    def __init__(self, table: torch.Tensor, needs: tuple[int, ...] = ()) -> None:
        self.table, self.needs = table, needs
        self.device, self.logits_dtype, self.vocab_size = table.device, table.dtype, table.shape[1]
        self.told: list[tuple] = []

    def start(self, target, state, max_cache_len, *, backend, clock):
        self.told.append(("start", max_cache_len))
        return BigramDrafting(self, state, backend, clock)


class BigramDrafting(Drafting):
    def prefill(self, lanes, tokens, num_tokens, hidden_states):
        self.source.told.append(("prefill", lanes, tokens, num_tokens, hidden_states))

    def grow(self, layout, buffers):
        for level in layout.levels:
            with self.clock.stage("draft"):
                logits = self.source.table[buffers.tokens[:, level.nodes].clamp(min=0)]
            self.draw_children(level, logits, buffers)

    def committed(self, path, hidden_states):
        self.source.told.append(("committed", path, hidden_states))


class TimedBigrams(Bigrams):
    def start(self, target, state, max_cache_len, *, backend, clock):
        return TimedBigramDrafting(self, state, backend, clock)


class TimedBigramDrafting(BigramDrafting):
    def level_call(self, step, context_len):
        tokens = torch.zeros(self.state.cache_lens.shape[0], step.node_ids.shape[0], dtype=torch.int64)
        return lambda: self.source.table[tokens]


def bigrams(target, noise: float = 0.0, **options) -> Bigrams:
    """What the target says behind each single token, with noise."""
    with torch.inference_mode():
        table = target(input_ids=torch.arange(target.config.vocab_size)[:, None]).logits[:, 0]
    generator = torch.Generator().manual_seed(0)
    return Bigrams(table + noise * torch.randn(table.shape, generator=generator), **options)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_output_is_the_targets_whatever_the_source_says(batch_size):
    target = tiny_llama(3, vocab_size=12, sharpness=4.0)
    prompts = torch.randint(12, (batch_size, 7), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=40).new_tokens
    source = bigrams(target)
    output = generate(target, source, prompts, tree=TREE, max_new_tokens=40)
    assert output.new_tokens == plain
    assert output.stats.tokens_per_step > 1.05  # some of its guesses were right
    assert output.stats.stage_seconds["draft"] > 0
    assert generate(target, Bigrams(-source.table), prompts, tree=TREE, max_new_tokens=40).new_tokens == plain


def test_the_joint_distribution_is_the_targets():
    target = tiny_llama(7, vocab_size=5, sharpness=8.0)
    prompt = torch.tensor([2, 0, 4])
    output = generate(
        target, bigrams(target, noise=0.5), prompt.repeat(6000, 1), seed=range(6000), tree=TREE, max_new_tokens=3,
        temperature=1.0,
    )  # fmt: skip
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(target, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def test_a_source_gets_the_hidden_states_that_it_needs_of_every_committed_row():
    target = tiny_llama(3, vocab_size=12, sharpness=4.0, num_layers=3)
    needs = (1, 3)
    source = bigrams(target, needs=needs)
    prompt = torch.randint(12, (1, 600 % 250), generator=torch.Generator().manual_seed(1))
    output = generate(target, source, prompt, tree=TREE, max_new_tokens=30)
    (_, lanes, tokens, num_tokens, of_prompt), *steps = [entry for entry in source.told if entry[0] != "start"]
    assert (lanes, tokens.tolist(), num_tokens.tolist()) == ([0], prompt.tolist(), [prompt.shape[1]])
    with torch.inference_mode():
        own = target(input_ids=output.sequences, output_hidden_states=True).hidden_states
    for place, number in enumerate(needs):
        rows = [of_prompt[place][0]]
        for _, path, hidden_states in steps:
            rows.append(hidden_states[place][0, path.nodes[0, : path.num_accepted[0]].long()])
        found = torch.cat(rows)[: output.sequences.shape[1] - 1]  # the last token is committed by no step
        torch.testing.assert_close(found, own[number][0, : len(found)], rtol=1e-4, atol=1e-4)


def test_hidden_states_of_prompts_that_are_fed_in_chunks():
    target = tiny_llama(3, vocab_size=12, max_positions=1200)
    source = bigrams(target, needs=(0, 2))
    prompt = torch.randint(12, (1, 1100), generator=torch.Generator().manual_seed(1))
    generate(target, source, prompt, tree=TREE, max_new_tokens=2)
    (told,) = [entry for entry in source.told if entry[0] == "prefill"]
    with torch.inference_mode():
        own = target(input_ids=prompt, output_hidden_states=True).hidden_states
    for number, found in zip((0, 2), told[4], strict=True):
        torch.testing.assert_close(found, own[number], rtol=1e-4, atol=1e-4)


def test_what_a_source_cannot_be_given_is_refused():
    target = tiny_llama(3, vocab_size=12)
    prompt = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"generate: draft must need hidden states in 0..2, got 3"):
        generate(target, bigrams(target, needs=(3,)), prompt, tree=TREE)
    with pytest.raises(ValueError, match=r"measure_profile: draft must tell what growing a level takes"):
        generate(target, bigrams(target), prompt)
    for needs in ((1, 1), 3, (True,), None):
        with pytest.raises(TypeError, match=r"generate: draft.needs must be a tuple of different integers, got"):
            generate(target, bigrams(target, needs=needs), prompt, tree=TREE)
    for positions, needs, message in (
        (1, (), "draft.positions must be"),
        (64, (1,), "draft.positions must be None where it needs hidden states, got 64"),
    ):
        source = bigrams(target, needs=needs)
        source.positions = positions
        with pytest.raises(ValueError, match=f"generate: {message}"):
            generate(target, source, prompt, tree=TREE)
    source = bigrams(target)
    source.device = torch.device("meta")
    with pytest.raises(ValueError, match="generate: draft must be on the target's device cpu, got meta"):
        generate(target, source, prompt, tree=TREE)
    source = bigrams(target)
    source.check_target = lambda target: (_ for _ in ()).throw(ValueError("no pair"))
    with pytest.raises(ValueError, match="no pair"):
        generate(target, source, prompt, tree=TREE)


@pytest.mark.parametrize("word", ["auto", "adaptive"])
def test_trees_are_planned_by_what_a_source_costs(word, monkeypatch):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    target = tiny_llama(3, vocab_size=12, sharpness=4.0)
    source = TimedBigrams(bigrams(target).table)
    prompt = torch.tensor([[1, 2, 3]])
    output = generate(target, source, prompt, tree=word, max_new_tokens=80, eos_token_id=())
    assert output.new_tokens == generate(target, None, prompt, max_new_tokens=80, eos_token_id=()).new_tokens
    (profile,) = auto._profiles.values()
    assert profile.draft_key == source.fingerprint.key and profile.draft_key.startswith("TimedBigrams")
    of_draft, of_target = (profile.forward_table(key, 1).p50_ms[0] for key in (profile.draft_key, profile.target_key))
    assert of_draft[0] < of_target[0]  # a look into a table
    assert measure_profile(target, source, context_lens=[16], node_counts=[1, 2, 4], seconds=0.05).draft_key


def test_a_model_is_a_source_and_a_source_stays_what_it_is():
    target = tiny_llama(3)
    draft = noisy_copy(target, 0.5)
    source = draft_source(draft)
    assert isinstance(source, ModelDraft) and source.model.model is draft and source.owner is draft
    assert draft_source(source) is source
    prompt = torch.tensor([[1, 2, 3]])
    options = {"tree": TREE, "max_new_tokens": 20, "temperature": 0.8, "seed": 4}
    of_source, of_model = (generate(target, entry, prompt, **options).new_tokens for entry in (source, draft))
    assert of_source == of_model
    draft.double()  # between two calls
    assert len(generate(target, source, prompt, **options).new_tokens[0]) == 20
    assert source.logits_dtype == torch.float64


def test_engines_with_other_sources_are_not_mixed_up(monkeypatch):
    """A kept engine belongs to its source, and to what the source says of its graphs."""
    made = []
    monkeypatch.setattr(engines, "can_capture", lambda target, draft: True)
    plain = engines.DecodingEngine.__init__
    monkeypatch.setattr(engines.DecodingEngine, "__init__", lambda self, *args: made.append(self) or plain(self, *args))

    class Replayed(engines.GraphedSteps):
        def __init__(self, run_step, state):
            self.run_step, self._captured = run_step, {}

        def capture(self, tree):
            self._captured[tree] = None

    monkeypatch.setattr(engines, "GraphedSteps", Replayed)
    engines.release_engines()
    target = adapt(tiny_llama(3, vocab_size=12))
    first, second = bigrams(target.model), bigrams(target.model, noise=3.0)
    options = {"tree": TREE, "max_new_tokens": 12}
    texts = []
    for source in (first, second, first, second):
        texts.append(generate(target, source, torch.tensor([[1, 2, 3]]), **options).new_tokens)
    assert len(made) == 2 and len({str(text) for text in texts}) == 1
    first.table, first.vocab_size = first.table[:, :8].contiguous(), 8  # its rows end sooner, and so do an engine's
    assert generate(target, first, torch.tensor([[1, 2, 3]]), **options).new_tokens == texts[0]
    assert len(made) == 3
    other = type("Other", (ModelDraft,), {})(adapt(noisy_copy(target.model, 0.3)))
    for source in (other, ModelDraft(other.model)):  # one model, two kinds of sources
        generate(target, source, torch.tensor([[1, 2, 3]]), **options)
    assert len(made) == 5
    made[2:] = []
    assert [engine.eager.drafting.source for engine in made] == [None, None]  # idle, they hold nobody
    type(first).graph_key = property(lambda self: id(self.table))
    try:
        generate(target, first, torch.tensor([[1, 2, 3]]), **options)
        assert len(made) == 3
    finally:
        del type(first).graph_key
        engines.release_engines()


class CachedBigrams(Bigrams):
    """With a cache that keeps the tokens that it was told, and fewer positions than a request may want."""

    positions = 32

    def start(self, target, state, max_cache_len, *, backend, clock):
        return CachedDrafting(self, state, max_cache_len, backend, clock)


class CachedDrafting(BigramDrafting):
    def __init__(self, source, state, max_cache_len, backend, clock):
        super().__init__(source, state, backend, clock)
        self.rows = torch.full((state.cache_lens.shape[0], max_cache_len, 1, 1), -1.0)

    def cache_tensors(self):
        return [self.rows]

    def prefill(self, lanes, tokens, num_tokens, hidden_states):
        assert tokens.device == num_tokens.device == self.state.cache_lens.device
        self.rows[lanes, : tokens.shape[1], 0, 0] = tokens.float()

    def grow(self, layout, buffers):
        super().grow(layout, buffers)
        for request, length in enumerate(self.state.draft_lens.tolist()):
            self.rows[request, length : length + layout.num_nodes, 0, 0] = buffers.tokens[request].float()


def test_a_source_with_a_cache_and_few_positions_is_compacted_and_begun_anew():
    target = tiny_llama(3, vocab_size=12, sharpness=4.0)
    prompts = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(1))
    output = generate(target, CachedBigrams(bigrams(target).table), prompts, tree=TREE, max_new_tokens=70)
    assert output.new_tokens == generate(target, None, prompts, max_new_tokens=70).new_tokens
    assert output.stats.draft_restarts > 0


def test_what_only_this_process_knows_is_not_kept_on_disk_and_not_mixed_up(monkeypatch):
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    saved = []
    for name in ("save_profile", "save_evidence"):
        monkeypatch.setattr(auto.store, name, lambda *arguments: saved.append(arguments))
    # slow enough for a draft in Python to be worth its time
    target = adapt(tiny_llama(3, vocab_size=12, sharpness=4.0), forward="modules")
    sources = [TimedBigrams(sign * bigrams(target.model).table) for sign in (1, -1)]
    for source in (*sources, *sources):
        generate(target, source, torch.tensor([[1, 2, 3]]), max_new_tokens=12)
    assert len(auto._profiles) == len(auto._pairs) == 2 and not saved
    named = type("Named", (TimedBigrams,), {"identity": "bigrams of a test"})(sources[0].table)
    generate(target, named, torch.tensor([[1, 2, 3]]), max_new_tokens=12)
    assert len(saved) == 2 and all(arguments[0]["source"] == "bigrams of a test" for arguments in saved)


def test_other_attentions_have_other_times():
    target = adapt(tiny_llama(3))
    keys = [
        auto._profile_key(adapt(target, attention=attention), draft_source(tiny_llama(3)), 128)
        for attention in (None, "reference", "host", lambda *arguments: attend_along_tree(*arguments))
    ]
    assert "attention" not in keys[0] and len({str(key) for key in keys}) == 4
    assert "0x" not in str(keys[1])
    with pytest.raises((TypeError, ValueError), match="attention"):
        adapt(target.model, attention="")


def test_an_idle_clock_counts_nothing():
    clock = StageClock(enabled=False)
    with clock.stage("draft"):
        pass
    assert dict(clock.seconds) == {}
