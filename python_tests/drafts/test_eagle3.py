"""EAGLE-3 and P-EAGLE heads: their numbers are the reference implementation's, and the text stays the target's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.chi_square import p_value, sequence_counts
from support.eagle_heads import chain_logits, write_head
from support.shaped_trees import steep_confidence
from support.tiny_models import sequence_probabilities, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from sequoia_kernels import ShapedTree, TokenTree, adapt, generate, measure_profile
from sequoia_kernels.decoding.engine import GraphedSteps
from sequoia_kernels.drafts import DecodingState, Drafting, Eagle3Draft, StageClock, draft_from_folder, format_of
from sequoia_kernels.models import PagedTreeCache, TreeStep, causal_step

DATA = Path(__file__).parent / "data" / "eagle3"
CASES = sorted(folder.name for folder in DATA.iterdir())
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7])


@pytest.fixture(scope="module")
def target():
    return adapt(tiny_llama(3, vocab_size=64, num_layers=5))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference_implementation(name, target):
    source = draft_from_folder(DATA / name, target)
    assert isinstance(source, Eagle3Draft) and source.loaded.feature_layers == (1, 3, 4)
    golden = load_file(DATA / name / "golden.safetensors")
    features, tokens, expected = golden["features"], golden["tokens"], golden["logits"]
    num_depths = expected.shape[0]
    if "anchor" in golden:
        known = int(golden["anchor"]) + 1
        assert source.num_depths == num_depths
        found = chain_logits(source, features[:known], tokens[:known], known, num_depths)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return
    if name == "sliding":  # training lets the window stand still while a row drafts, decoding does not
        num_depths = 1
    for known in range(1, len(tokens) - num_depths + 2):
        found = chain_logits(source, features[:known], tokens[: known + num_depths - 1], known)
        torch.testing.assert_close(found, expected[:num_depths, known - 1], rtol=1e-5, atol=1e-5)


def rows_of(source, num_rows):
    """The drafting of one request, and what runs rows behind one another in it."""
    state = DecodingState.create(1, source.device, seeds=[0], temperature=[1.0], top_k=None, top_p=None)
    drafting = source.start(None, state, 64, backend="auto", clock=StageClock(enabled=False))
    return drafting, drafting._bind(num_rows, causal_step(num_rows))


@pytest.mark.parametrize("name", CASES)
def test_native_forwards_give_the_reference_implementations_numbers(name, target):
    source = Eagle3Draft.from_folder(DATA / name, target, forward="native")
    assert source.runs == "native"
    golden = load_file(DATA / name / "golden.safetensors")
    features, tokens, expected = golden["features"], golden["tokens"], golden["logits"]
    num_depths = expected.shape[0]
    parallel = "anchor" in golden
    known = int(golden["anchor"]) + 1 if parallel else len(tokens) - num_depths + 1
    given = source.head.combine(features[None, :known].split(32, -1))
    if parallel:
        extra = num_depths - 1
        drafting, rows = rows_of(source, known + extra)
        fed = torch.cat((tokens[:known], torch.full((extra,), source.head.mask_token_id)))
        given = torch.cat((given, source.head.mask_feature.expand(1, extra, -1)), 1)
        _, logits = rows.run(fed[None], given, torch.zeros(1, dtype=torch.int32))
        torch.testing.assert_close(logits[0, known - 1 :], expected, rtol=1e-5, atol=1e-5)
        return
    if name == "sliding":  # training lets the window stand still while a row drafts, decoding does not
        num_depths = 1
    drafting, rows = rows_of(source, known)
    outputs, logits = rows.run(tokens[None, :known], given, torch.zeros(1, dtype=torch.int32))
    torch.testing.assert_close(logits[0], expected[0, :known], rtol=1e-5, atol=1e-5)
    features = source.head.next_features(outputs[:, -1:])
    single = drafting._bind(1, causal_step(1))
    for depth in range(1, num_depths):
        row = known + depth - 1
        outputs, logits = single.run(tokens[None, row : row + 1], features, torch.tensor([row], dtype=torch.int32))
        torch.testing.assert_close(logits[0, 0], expected[depth, known - 1], rtol=1e-5, atol=1e-5)
        features = source.head.next_features(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_rows_are_the_same_bits_beside_others(dtype, tmp_path):
    """A node's logits and outputs do not depend on its siblings, nor on requests beside its own."""
    model = tiny_llama(3, vocab_size=12).to(dtype)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model, num_layers=2), adapt(model))
    generator = torch.Generator().manual_seed(2)
    prefix, count = 5, TREE.num_nodes
    tokens = torch.randint(12, (2, prefix + count), generator=generator)
    features = torch.randn(2, prefix + count, 32, generator=generator)
    state = DecodingState.create(2, source.device, seeds=[0, 0], temperature=[1.0] * 2, top_k=None, top_p=None)
    drafting = source.start(None, state, 64, backend="auto", clock=StageClock(enabled=False))
    lens = torch.zeros(2, dtype=torch.int32)
    drafting._bind(prefix, causal_step(prefix)).run(tokens[:, :prefix], features[:, :prefix], lens)
    whole = drafting._bind(count, TreeStep.of(TREE)).run(tokens[:, prefix:], features[:, prefix:], lens + prefix)
    for lane in range(2):
        for node in range(count):
            path = [node]
            while TREE.parents[path[0]] >= 0:
                path.insert(0, TREE.parents[path[0]])
            rows = [*range(prefix), *(prefix + entry for entry in path)]
            _, chain = rows_of(source, len(rows))
            alone = chain.run(tokens[lane, rows][None], features[lane, rows][None], lens[:1])
            for mine, its in zip(whole, alone, strict=True):
                assert torch.equal(mine[lane, node], its[0, -1])


@pytest.mark.parametrize("forward", ["native", "torch"])
def test_heads_read_caches_in_pages(forward, tmp_path):
    source = Eagle3Draft.from_folder(
        write_head(tmp_path / "head", tiny_llama(3, vocab_size=12), num_layers=2), adapt(tiny_llama(3, vocab_size=12)),
        forward=forward,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(12, (2, 21), generator=generator)
    features = torch.randn(2, 21, 32, generator=generator)
    state = DecodingState.create(2, source.device, seeds=[0, 0], temperature=[1.0] * 2, top_k=None, top_p=None)
    lens, found = torch.zeros(2, dtype=torch.int32), []
    for page_size in (None, 1, 4):
        drafting = source.start(None, state, 24, backend="auto", clock=StageClock(enabled=False))
        if page_size is not None:
            order = torch.randperm(48 // page_size, generator=generator).to(torch.int32).view(2, -1)
            pool = PagedTreeCache(drafting.cache.specs, order.numel(), page_size)
            drafting.cache = pool.of(order)
        scored = []
        for first, step in ((0, causal_step(11)), (11, TreeStep.of(TREE))):
            part = slice(first, first + step.node_ids.shape[0])
            scored += drafting._bind(part.stop - first, step).run(tokens[:, part], features[:, part], lens + first)
        found.append(scored)
    for one in found[1:]:
        for mine, its in zip(one, found[0], strict=True):
            assert torch.equal(mine, its) if forward == "native" else torch.allclose(mine, its, rtol=1e-5, atol=1e-5)


def test_what_runs_forwards_is_chosen_by_name(target):
    assert Eagle3Draft.from_folder(DATA / "plain", target).runs == "native"
    torch_only = Eagle3Draft.from_folder(DATA / "plain", target, forward="torch")
    assert (torch_only.runs, torch_only.not_native) == ("torch", "torch was asked for")
    with pytest.raises(ValueError, match=r"forward must be one of auto, native, torch, got 'fast'"):
        Eagle3Draft.from_folder(DATA / "plain", target, forward="fast")
    wide = adapt(tiny_llama(3, vocab_size=64, num_layers=5).double())
    assert "float64" in Eagle3Draft.from_folder(DATA / "plain", wide).not_native
    with pytest.raises(
        ValueError, match=r"forward must be 'auto' or 'torch' for this head: a weight is of torch.float64"
    ):
        Eagle3Draft.from_folder(DATA / "plain", wide, forward="native")


def original_form(name: str, folder: Path) -> Path:
    """Write a head of the speculators form as the original form has it."""
    config = json.loads((DATA / name / "config.json").read_text())
    fields = config["transformer_layer_config"] | {"architectures": ["LlamaForCausalLMEagle3"]}
    fields |= {key: config[key] for key in ("draft_vocab_size", "norm_before_residual", "norm_output")}
    fields["eagle_config"] = {"norm_before_fc": config["norm_before_fc"], "use_aux_hidden_state": True}
    fields["fc_norm"] = config["fc_norm"]
    weights = load_file(DATA / name / "model.safetensors")
    if name == "peagle":
        fields["eagle_aux_hidden_state_layer_ids"] = config["eagle_aux_hidden_state_layer_ids"]
        fields["ptd_token_id"] = config["mask_token_id"]
        weights["mask_hidden"] = weights["mask_hidden"].flatten()[None]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    renamed = {key.replace("layers.0.", "midlayer."): weight for key, weight in weights.items()}
    torch.save(renamed, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("name", sorted(set(CASES) - {"peagle"}))
def test_both_forms_of_a_head_are_the_same_head(name, target, tmp_path):
    source = draft_from_folder(original_form(name, tmp_path / name), target)
    other = draft_from_folder(DATA / name, target)
    for mine, its in zip(source.head.weights(), other.head.weights(), strict=True):
        assert torch.equal(mine, its)
    assert (source.head.norm_output, source.vocab_size) == (other.head.norm_output, other.vocab_size)
    assert source.loaded.feature_layers == (2, 2, 2)  # of five layers: 2, 5 // 2, 5 - 3
    assert source.needs == (2,)


def test_layer_ids_are_read_as_each_form_means_them(tmp_path):
    target = adapt(tiny_llama(3, vocab_size=12, num_layers=5))
    of_outputs = write_head(tmp_path / "outputs", target.model, layer_ids=(1, 3, 4))
    assert json.loads((of_outputs / "config.json").read_text())["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [0, 2, 3]
    }
    assert Eagle3Draft.from_folder(of_outputs, target).needs == (1, 3, 4)
    of_states = write_head(tmp_path / "states", target.model, layer_ids=(0, 3, 4))
    assert Eagle3Draft.from_folder(of_states, target).needs == (0, 3, 4)
    assert Eagle3Draft.from_folder(of_states, target, feature_layers=(5, 1, 5)).needs == (5, 1)
    for asked in ((1, 2), (1, 2, 6), (-1, 2, 3)):
        with pytest.raises(ValueError, match=r"feature_layers must be 3 hidden states in 0..5 of the target, got"):
            Eagle3Draft.from_folder(of_states, target, feature_layers=asked)


def test_embeddings_and_head_of_the_target_are_shared(tmp_path):
    target = adapt(tiny_llama(3, vocab_size=12))
    folder = write_head(tmp_path / "head", target.model, drop=("embed_tokens.weight", "lm_head.weight"))
    head = Eagle3Draft.from_folder(folder, target).head
    assert head.embed.data_ptr() == target.model.model.embed_tokens.weight.data_ptr()
    assert head.lm_head.weight.data_ptr() == target.model.lm_head.weight.data_ptr()
    part = write_head(tmp_path / "part", target.model, drop=("lm_head.weight",), draft_vocab_size=5)
    source = Eagle3Draft.from_folder(part, target)
    assert torch.equal(source.head.lm_head.weight, target.model.lm_head.weight[source.vocabulary.draft_to_target])
    wider = adapt(tiny_llama(3, vocab_size=12, hidden_size=64))
    with pytest.raises(ValueError, match=r"fc.weight must have shape \[32, 192\], got \[32, 96\]"):
        Eagle3Draft.from_folder(folder, wider)


def recorded(monkeypatch) -> list[tuple]:
    """Note every level that is drawn: nodes, tokens of the tree, logits, state."""
    levels: list[tuple] = []
    plain = Drafting.draw_children

    def draw_children(self, level, logits, buffers):
        state = self.state
        lens, active = state.cache_lens.clone(), state.active.clone()
        levels.append((level.nodes.clone(), buffers.tokens.clone(), logits.clone(), lens, active))
        plain(self, level, logits, buffers)

    monkeypatch.setattr(Drafting, "draw_children", draw_children)
    return levels


def check_levels(source, target, sequences, levels, trees, rtol=1e-3):
    """Compare every node's logits with those of its path fed alone behind the text's own rows."""
    checked = 0
    with torch.inference_mode():
        states = [
            target(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
            for sequence in sequences
        ]
    for nodes, tokens, logits, lens, active in levels:
        for lane, tree in enumerate(trees):
            if not active[lane]:
                continue
            known = int(lens[lane])
            features = torch.cat([states[lane][number][0, :known] for number in source.needs], -1)
            text = torch.tensor(sequences[lane][1 : known + 1])
            assert int(tokens[lane, 0]) == int(text[-1])  # the root
            for place, node in enumerate(nodes.tolist()):
                path = [node]
                while tree.parents[path[0]] > 0:
                    path.insert(0, tree.parents[path[0]])
                path = [entry for entry in path if entry > 0]
                drafted = tokens[lane, path].clamp(min=0)
                if source.head.mask_feature is None:
                    expected = chain_logits(source, features, torch.cat((text, drafted)), known)[-1]
                else:
                    depth = min(len(path), source.num_depths - 1)
                    expected = chain_logits(source, features, text, known, source.num_depths)[depth]
                found = logits[lane, place]
                torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
                checked += 1
    return checked


OPTIONS = [
    {},
    {"config": {"sliding_window": 4, "layer_types": ["sliding_attention"]}},
    {"config": {"norm_before_residual": True, "norm_output": True, "fc_norm": True}},
    {"config": {"norm_before_fc": True}, "num_layers": 2},
]


@pytest.mark.parametrize("forward", ["native", "torch"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_node_is_scored_as_its_path_alone(options, forward, tmp_path, monkeypatch):
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model, **options), target, forward=forward)
    levels = recorded(monkeypatch)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    output = generate(target, source, prompt, tree=TREE, max_new_tokens=30, temperature=0.7, seed=5)
    assert output.stats.tokens_per_step > 1.2  # tokens were accepted, and their rows computed again
    assert check_levels(source, model, output.sequences.tolist(), levels, [TREE]) > 60


@pytest.mark.parametrize("forward", ["native", "torch"])
@pytest.mark.parametrize("num_depths", [None, 2])  # where there are few, deeper levels take the last row
def test_a_parallel_head_gives_a_row_for_each_depth(num_depths, forward, monkeypatch):
    model = tiny_llama(3, vocab_size=64, num_layers=5, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(DATA / "peagle", target, num_depths=num_depths, forward=forward)
    assert source.num_depths == (num_depths or 4)
    levels = recorded(monkeypatch)
    output = generate(target, source, torch.tensor([[3, 1, 4, 1]]), tree=TREE, max_new_tokens=30, temperature=1.0)
    assert check_levels(source, model, output.sequences.tolist(), levels, [TREE]) > 60


def test_a_parallel_head_of_the_original_form_is_that_of_the_other(target, tmp_path):
    """vLLM's form of P-EAGLE: the same weights give the same numbers, and the same text."""
    folder = original_form("peagle", tmp_path / "original")
    assert format_of(folder).name == "eagle3"
    given = draft_from_folder(DATA / "peagle", target)
    found = draft_from_folder(folder, target)
    assert repr(found).startswith("Eagle3Draft(peagle, ") and found.num_depths == 8  # such folders do not say how many
    assert found.head.mask_token_id == given.head.mask_token_id == 7
    assert torch.equal(found.head.mask_feature, given.head.mask_feature)
    golden = load_file(DATA / "peagle" / "golden.safetensors")
    known = int(golden["anchor"]) + 1
    for source in (given, found):
        logits = chain_logits(source, golden["features"][:known], golden["tokens"][:known], known, 4)
        torch.testing.assert_close(logits, golden["logits"], rtol=1e-5, atol=1e-5)
    prompt = torch.tensor([[3, 1, 4, 1]])
    options = {"tree": TREE, "max_new_tokens": 30, "temperature": 1.0, "seed": 3}
    sources = given, Eagle3Draft.from_folder(folder, target, num_depths=given.num_depths)
    texts = [generate(target, source, prompt, **options) for source in sources]
    assert texts[0].new_tokens == texts[1].new_tokens
    assert texts[0].stats.request_steps == texts[1].stats.request_steps


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"ptd_token_id": 5}, (1, 96)),
        ({"pard_token": 5, "parallel_drafting": True}, (96,)),
        ({"mask_token_id": 5, "parallel_drafting": True, "num_depths": 3}, (1, 1, 96)),
        ({"ptd_token_id": 5, "mask_token_id": 5, "architectures": ["PEagleDraftModel"]}, (1, 96)),
        ({"ptd_token_id": 5, "architectures": ["LlamaForCausalLM"]}, (1, 96)),
    ],
)
def test_parallel_heads_of_the_original_form(config, shape, tmp_path):
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    head = write_head(tmp_path / "head", model, num_layers=4)
    source = draft_from_folder(changed(head, tmp_path / "parallel", config, {"mask_hidden": mask}), target)
    assert source.head.mask_token_id == 5 and source.num_depths == config.get("num_depths", 8)
    expected = source.head.combine(mask.flatten().split(32))
    torch.testing.assert_close(source.head.mask_feature, expected, rtol=1e-6, atol=1e-6)
    prompts = torch.randint(12, (2, 5), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=20).new_tokens
    assert generate(target, source, prompts, tree=TREE, max_new_tokens=20).new_tokens == plain


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"parallel_drafting": True}, {}, "must give one of ptd_token_id, pard_token, mask_token_id, since .* none"),
        ({"parallel_drafting": "yes"}, {}, "parallel_drafting must be true or false, got 'yes'"),
        ({"ptd_token_id": 5}, {"mask_hidden": None}, "must hold mask_hidden, got"),
        ({"ptd_token_id": 5}, {"mask_hidden": torch.ones(1, 32)}, r"mask_hidden must have shape \[1, 96\], got .*32\]"),
        (
            {"ptd_token_id": 5},
            {"mask_hidden": torch.ones(2, 96)},
            r"mask_hidden must have shape \[1, 96\], got \[2",
        ),
        ({"ptd_token_id": 12}, {}, r"ptd_token_id must be in 0\.\.11, got 12"),
        ({"pard_token": "5"}, {}, "pard_token must be an integer of at least 0, got '5'"),
        ({"ptd_token_id": 5, "pard_token": 6}, {}, r"ptd_token_id and pard_token must be one token, got \[5, 6\]"),
        ({"ptd_token_id": 5, "num_depths": 0}, {}, "num_depths must be an integer of at least 1, got 0"),
        ({"ptd_token_id": 5, "num_depths": 10**9}, {}, "must propose at most 256 tokens at once, got 1000000000"),
        ({}, {}, "must hold no weights beside those of its format, got mask_hidden"),
        ({"mask_token_id": 5}, {}, "must hold no weights beside those of its format, got mask_hidden"),
        ({"ptd_token_id": 5, "parallel_drafting": False}, {}, "must hold no weights beside .*, got mask_hidden"),
        ({"ptd_token_id": 5, "parallel_drafting": 0}, {}, "must hold no weights beside .*, got mask_hidden"),
    ],
)
def test_what_is_not_understood_of_a_parallel_head_is_named(config, weights, message, tmp_path):
    target = adapt(tiny_llama(3, vocab_size=12))
    head = write_head(tmp_path / "head", target.model)
    folder = changed(head, tmp_path / "changed", config, {"mask_hidden": torch.ones(1, 96)} | weights)
    with pytest.raises(ValueError, match=rf"^draft folder {folder}: .*{message}"):
        draft_from_folder(folder, target)


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths with their attention mask."""
    rows = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    lens = torch.tensor([len(prompt) for prompt in prompts])
    return rows, torch.arange(rows.shape[1]) < lens[:, None]


@pytest.mark.parametrize("forward", ["native", "torch"])
def test_a_batch_is_scored_as_its_requests_alone(forward, tmp_path, monkeypatch):
    """Requests accept different numbers of tokens and end at different times."""
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target, forward=forward)
    levels = recorded(monkeypatch)
    prompts = [torch.tensor(prompt) for prompt in ([3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9])]
    options = {"tree": TREE, "temperature": 0.7}
    batch = {"seed": [1, 2, 3], "eos_token_id": 4, **options}
    output = generate(target, source, *padded(prompts), max_new_tokens=25, **batch)
    texts = [prompt.tolist() + new for prompt, new in zip(prompts, output.new_tokens, strict=True)]
    assert len({len(new) for new in output.new_tokens}) > 1
    assert check_levels(source, model, texts, levels, [TREE] * 3) > 100
    for number, prompt in enumerate(prompts):
        alone = generate(target, source, prompt[None], max_new_tokens=25, **batch | {"seed": number + 1})
        assert alone.new_tokens[0] == output.new_tokens[number]


def test_trees_may_change_from_step_to_step(tmp_path, monkeypatch):
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target)
    step, texts = begun(target, source, [[3, 1, 4, 1, 5], [2, 6]])
    trees = [TREE, TokenTree.single(), TokenTree.chain(6), TokenTree([-1, 0, 0]), TREE, TokenTree.chain(6)]
    levels = recorded(monkeypatch)
    spans = []
    for tree in trees * 3:
        before = len(levels)
        emitted = step.run(tree)
        spans.append((before, len(levels), tree))
        for text, tokens, count in zip(texts, emitted.tokens.tolist(), emitted.num_tokens.tolist(), strict=True):
            text += tokens[:count]
    checked = [check_levels(source, model, texts, levels[start:end], [tree] * 2) for start, end, tree in spans]
    assert sum(checked) > 100


def begun(target, source, prompts):
    """Begin a batch of prompts, one lane after the other, as a loop of one's own may."""
    from sequoia_kernels.decoding.step import DecodingStep
    from sequoia_kernels.drafts import DecodingState

    count = len(prompts)
    state = DecodingState.create(
        count, target.device, seeds=list(range(count)), temperature=[0.9] * count, top_k=None, top_p=None
    )
    step = DecodingStep(target, source, state, 200)
    lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    whole = step.drafting.prefill

    def prefill(lanes, tokens, num_tokens, hidden_states):  # each lane by itself
        for lane in lanes:
            length = int(num_tokens[lane])
            part = [states[lane : lane + 1, :length] for states in hidden_states]
            whole([lane], tokens[lane : lane + 1, :length], num_tokens[lane : lane + 1], part)

    step.drafting.prefill = prefill
    emitted = step.prefill(padded, lens)
    texts = [prompt + tokens[:1] for prompt, tokens in zip(prompts, emitted.tokens.tolist(), strict=True)]
    return step, texts


@pytest.mark.parametrize("parallel", [False, True])
def test_long_prompts_are_fed_in_chunks(parallel, tmp_path, monkeypatch):
    """Of 512 rows: a prompt ends with one, and of a parallel head the depths below its root are in the next."""
    model = tiny_llama(3, vocab_size=64, num_layers=5, max_positions=1200, sharpness=4.0)
    target = adapt(model)
    folder = DATA / "peagle" if parallel else write_head(tmp_path / "head", model)
    source = Eagle3Draft.from_folder(folder, target)
    levels = recorded(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(64, (length,), generator=generator) for length in (1000, 512, 40)]
    output = generate(target, source, *padded(prompts), tree=TREE, max_new_tokens=3, temperature=1.0)
    texts = [prompt.tolist() + new for prompt, new in zip(prompts, output.new_tokens, strict=True)]
    assert check_levels(source, model, texts, levels[:4], [TREE] * 3) > 10


HEADS = {
    "random": {},
    "features_of_other_layers": {"feature_layers": (1, 0, 2)},
    "two_layers": {"num_layers": 2, "config": {"norm_output": True}},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_targets_whatever_the_head_says(name, batch_size, tmp_path):
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    options = dict(HEADS[name])
    layers = options.pop("feature_layers", None)
    folder = write_head(tmp_path / "head", model, **options)
    source = Eagle3Draft.from_folder(folder, target, feature_layers=layers)
    prompts = torch.randint(12, (batch_size, 7), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=40).new_tokens
    output = generate(target, source, prompts, tree=TREE, max_new_tokens=40)
    assert output.new_tokens == plain
    assert output.stats.stage_seconds["draft"] > 0


def test_the_joint_distribution_is_the_targets(tmp_path):
    model = tiny_llama(7, vocab_size=5, sharpness=8.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target)
    prompt = torch.tensor([2, 0, 4])
    tree = TokenTree([-1, 0, 0, 1, 1, 2, 3])
    output = generate(
        target, source, prompt.repeat(6000, 1), seed=range(6000), tree=tree, max_new_tokens=3, temperature=1.0
    )  # fmt: skip
    assert output.stats.tokens_per_step > 1.2
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(model, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


def changed(folder: Path, into: Path, config=None, weights=None) -> Path:
    """Copy a folder with other options and weights; None drops one."""
    shutil.copytree(folder, into)
    fields = json.loads((folder / "config.json").read_text()) | (config or {})
    (into / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    tensors = load_file(folder / "model.safetensors") | (weights or {})
    save_file({key: value for key, value in tensors.items() if value is not None}, into / "model.safetensors")
    return into


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({}, {"norm.weight": None}, r"must hold norm.weight, got"),
        ({}, {"midlayer.mlp.up_proj.weight": None}, r"must hold midlayer.mlp.up_proj.weight \(or layers.0.mlp"),
        ({}, {"extra.bias": torch.ones(2)}, r"must hold no weights beside those of its format, got extra.bias"),
        ({}, {"midlayer.self_attn.q_norm.weight": torch.ones(8)}, r"got midlayer.self_attn.q_norm.weight"),
        ({}, {"fc.weight": torch.ones(32, 64)}, r"fc.weight must have shape \[32, 96\], got \[32, 64\]"),
        ({}, {"lm_head.weight": torch.ones(5, 32)}, r"lm_head.weight must have shape \[12, 32\], got \[5, 32\]"),
        ({"model_type": "mixtral"}, {}, r"must be of the family llama or qwen3, got 'mixtral'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, r"rope_type must be one of .*, got 'dynamic'"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, {}, r"use_aux_hidden_state must be True, got False"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, {}, r"use_mtp_layernorm must be False, got True"),
        ({"eagle_config": {"twist": 3}}, {}, r"must hold options that are known here, got twist = 3"),
        ({"norm_output": "yes"}, {}, r"norm_output must be true or false, got 'yes'"),
        ({"norm_before_fc": True, "fc_norm": True}, {}, r"norm_before_fc and fc_norm must not both be on"),
        ({"fc_norm": True}, {}, r"must hold fc_norm.0.weight, got"),
        ({"attention_bias": True}, {}, r"must hold midlayer.self_attn.q_proj.bias"),
        ({"hidden_act": "twist"}, {}, r"hidden_act must be an activation of transformers', got 'twist'"),
        ({"hidden_size": None}, {}, r"hidden_size must be an integer of at least 1, got None"),
        ({"draft_vocab_size": 5}, {"lm_head.weight": torch.ones(5, 32)}, r"must hold d2t"),
        ({"num_aux_hidden_states": 4}, {}, r"num_aux_hidden_states must be the 3 of .*, got 4"),
    ],
)
def test_what_is_not_understood_is_named(config, weights, message, tmp_path):
    target = adapt(tiny_llama(3, vocab_size=12))
    folder = changed(write_head(tmp_path / "head", target.model), tmp_path / "changed", config, weights)
    with pytest.raises(ValueError, match=rf"^draft folder {folder}: .*{message}"):
        draft_from_folder(folder, target)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"twist": 3}, {}, r"must hold options that are known here, got twist = 3"),
        ({"transformer_layer_config": 3}, {}, r"transformer_layer_config must be an object, got 3"),
        ({"mask_token_id": None}, {}, r"mask_token_id must be an integer of at least 0, got None"),
        ({"mask_token_id": 64}, {}, r"mask_token_id must be in 0..63, got 64"),
        ({}, {"mask_hidden": None}, r"must hold mask_hidden"),
        ({}, {"d2t": torch.full((24,), 50)}, r"d2t must give tokens of the target"),
        ({}, {"d2t": torch.zeros(24, dtype=torch.int64)}, r"t2d must mark the 24 tokens that d2t gives"),
        ({"eagle_aux_hidden_state_layer_ids": "123"}, {}, r"must be layers of the target, got '123'"),
        ({"speculators_config": {"proposal_methods": 3}}, {}, r"proposal_methods must be a list, got 3"),
    ],
)
def test_what_is_not_understood_of_the_other_form_is_named(config, weights, message, target, tmp_path):
    folder = changed(DATA / "peagle", tmp_path / "changed", config, weights)
    with pytest.raises(ValueError, match=rf"^draft folder {folder}: .*{message}"):
        draft_from_folder(folder, target)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be at most 1000"),
        ({"rms_norm_eps": -0.5}, "rms_norm_eps must be a finite number >= 0, got -0.5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number >= 0, got nan"),
        ({"sliding_window": 0}, r"sliding_window must be an integer in \[1, 2\^31\), got 0"),
        ({"sliding_window": 1 << 70}, r"sliding_window must be an integer in \[1, 2\^31\)"),
        ({"sliding_window": None}, r"sliding_window must be an integer in \[1, 2\^31\), got None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_parameters must be those of a rotary"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_parameters must be those of a"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_parameters must give finite freq"),
    ],
)
def test_numbers_that_layers_cannot_compute_with_are_named(layers, message, target, tmp_path):
    config = json.loads((DATA / "sliding" / "config.json").read_text())["transformer_layer_config"]
    folder = changed(DATA / "sliding", tmp_path / "changed", {"transformer_layer_config": config | layers})
    with pytest.raises(ValueError, match=rf"^draft folder {folder}: {message}"):
        draft_from_folder(folder, target)


def test_a_head_says_what_it_is(target, tmp_path):
    source = Eagle3Draft.from_folder(DATA / "plain", target)
    assert repr(source).startswith("Eagle3Draft(eagle3, ") and "plain" in repr(source)
    again, other = (Eagle3Draft.from_folder(DATA / name, target) for name in ("plain", "qwen3_layers"))
    assert source.identity == again.identity != other.identity
    assert source.identity != Eagle3Draft.from_folder(DATA / "plain", target, feature_layers=(1, 2, 4)).identity
    assert source.graph_key != again.graph_key  # their weights lie elsewhere
    assert source.fingerprint == again.fingerprint and source.fingerprint.key.startswith("eagle3-1x32-float32-")
    weights = [entry.weight for entry in (source.head.fc, source.head.lm_head)]
    assert source.fingerprint.num_parameters > sum(weight.numel() for weight in weights)
    with pytest.raises(ValueError, match=r"num_depths must be 1 for a head that is not parallel, got 2"):
        Eagle3Draft.from_folder(DATA / "plain", target, num_depths=2)
    source.check_target(target)
    with pytest.raises(ValueError, match=r"target must have hidden states of width 32, got 64"):
        source.check_target(adapt(tiny_llama(3, vocab_size=64, num_layers=5, hidden_size=64)))
    with pytest.raises(ValueError, match=r"target must have 64 tokens, got 70"):
        source.check_target(adapt(tiny_llama(3, vocab_size=70, num_layers=5)))
    assert draft_from_folder(write_model(tmp_path / "model"), target) is None
    with pytest.raises(ValueError, match="must be an EAGLE-3 or P-EAGLE head, got"):
        Eagle3Draft.from_folder(tmp_path / "model", target)


def write_model(folder: Path) -> Path:
    tiny_llama(0, vocab_size=12).save_pretrained(folder)
    return folder


# Trees and engines


def test_trees_of_each_request_and_shaped_trees(tmp_path, monkeypatch):
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target)
    prompts = torch.randint(12, (2, 6), generator=torch.Generator().manual_seed(1))
    trees = (TokenTree([-1, 0, 0, 0, 1, 1, 2, 4]), TokenTree([-1, 0, 0, 0, 1, 3, 3, 5]))
    levels = recorded(monkeypatch)
    step, texts = begun(target, source, prompts.tolist())
    shaped = ShapedTree((1, 2, 3, 2), steep_confidence())
    checked = 0
    for tree in (trees, shaped) * 6:
        before = len(levels)
        emitted = step.run(tree)
        layout = step.prepare(tree)[0]
        parents = layout.topology.parents.tolist()
        shapes = [SimpleNamespace(parents=row) for row in parents]
        for text, tokens, count in zip(texts, emitted.tokens.tolist(), emitted.num_tokens.tolist(), strict=True):
            text += tokens[:count]
        checked += check_levels(source, model, texts, levels[before:], shapes)
    assert checked > 60


@pytest.mark.parametrize("forward", ["native", "torch"])
def test_a_step_that_is_run_to_be_captured_leaves_the_head_as_it_was(forward, tmp_path, monkeypatch, fake_cuda):
    """The drafts behind a capture, which runs steps and takes them back, are those without one."""
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target, forward=forward)
    levels = recorded(monkeypatch)
    runs = []
    for captures in (False, True):
        step, _texts = begun(target, source, [[3, 1, 4, 1, 5], [2, 6]])
        step.prepare(TREE)
        if captures:
            launched = lambda tree, step=step: fake_cuda.launch(None, lambda: step.run(tree))  # noqa: E731
            GraphedSteps(launched, step.state).capture(TREE)
        before = len(levels)
        emitted = [step.run(TREE) for _ in range(3)]
        runs.append((levels[before:], emitted))
    assert len(levels) > len(runs[0][0]) + len(runs[1][0])  # the capture ran steps
    for (_, tokens, logits, *_), (_, others, other_logits, *_) in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(tokens[:, 0], others[:, 0]) and torch.equal(logits, other_logits)
    for mine, its in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(mine.tokens, its.tokens)


def test_a_batch_that_follows_another_begins_anew(tmp_path, monkeypatch):
    """As in an engine that is kept: the source lets go in between, and another one of the same weights goes on."""
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target)
    step, texts = begun(target, source, [[3, 1, 4, 1, 5]])
    for _ in range(4):
        step.run(TREE)
    for tensor in step.drafting.cache.tensors():
        tensor.fill_(torch.inf)  # of a batch whose numbers ran over
    step.use(None, None, StageClock(enabled=False))
    assert step.drafting.source is None
    step.use(target, source, StageClock(enabled=False))
    fresh, texts = begun(target, source, [[2, 7, 1, 8]])
    step.restart(fresh.state)
    state = step.state
    for tensor in (state.cache_lens, state.offsets):
        tensor.zero_()
    levels = recorded(monkeypatch)
    prompt = torch.tensor([[2, 7, 1, 8]])
    first = step.prefill(prompt, torch.tensor([4], dtype=torch.int32))
    text = [2, 7, 1, 8, *first.tokens[0].tolist()]
    assert text == texts[0]
    for _ in range(5):
        emitted = step.run(TREE)
        text += emitted.tokens[0, : int(emitted.num_tokens[0])].tolist()
    assert check_levels(source, model, [text], levels, [TREE]) > 20


@pytest.mark.parametrize("name", ["plain", "eagle31", "peagle"])
def test_a_head_of_few_tokens_drafts_the_targets(name, monkeypatch):
    """Logits are of its own tokens; what is drawn are the target's, and the text stays the target's."""
    model = tiny_llama(3, vocab_size=64, num_layers=5, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(DATA / name, target)
    known = set(source.vocabulary.draft_to_target.tolist())
    levels = recorded(monkeypatch)
    prompts = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
    plain = generate(target, None, prompts, max_new_tokens=30).new_tokens
    output = generate(target, source, prompts, tree=TREE, max_new_tokens=30)
    assert output.new_tokens == plain
    assert {logits.shape[2] for _, _, logits, *_ in levels} == {len(known)} == {24}
    drafted = {
        token for nodes, tokens, *_ in levels if int(nodes[0]) > 0 for token in tokens[:, nodes].flatten().tolist()
    }
    assert drafted <= known and len(drafted) > 3
    texts = output.sequences.tolist()
    assert check_levels(source, model, texts, levels, [TREE] * 2) > 100


@pytest.mark.parametrize("wrong", [False, True])
def test_the_joint_distribution_with_a_head_of_few_tokens(wrong, tmp_path):
    """With a wrong map as well: the guesses are other tokens then, drawn with the same probabilities."""
    model = tiny_llama(7, vocab_size=5, sharpness=8.0)
    target = adapt(model)
    folder = write_head(tmp_path / "head", model, draft_vocab_size=3)
    if wrong:
        weights = load_file(folder / "model.safetensors")
        known = weights["d2t"] + torch.arange(3)
        others = torch.tensor([token for token in range(5) if token not in known.tolist()] + known.tolist())[:3]
        marks = torch.zeros(5, dtype=torch.bool).index_fill_(0, others, True)
        folder = changed(folder, tmp_path / "wrong", weights={"d2t": others - torch.arange(3), "t2d": marks})
    source = Eagle3Draft.from_folder(folder, target)
    prompt = torch.tensor([2, 0, 4])
    tree = TokenTree([-1, 0, 0, 1, 1, 2, 3])
    output = generate(
        target, source, prompt.repeat(6000, 1), seed=range(6000), tree=tree, max_new_tokens=3, temperature=1.0
    )  # fmt: skip
    assert output.stats.tokens_per_step > 1.1
    counts = sequence_counts(torch.tensor(output.new_tokens), 5)
    assert p_value(counts, sequence_probabilities(model, prompt, 3, lambda logits: logits.softmax(-1))) > 1e-4


@pytest.mark.parametrize("name", ["plain", "peagle"])
def test_what_a_level_costs_can_be_measured(name, monkeypatch):
    target = adapt(tiny_llama(3, vocab_size=64, num_layers=5, sharpness=4.0))
    source = Eagle3Draft.from_folder(DATA / name, target)
    profile = measure_profile(target, source, context_lens=[16], node_counts=[1, 2, 4], seconds=0.05)
    assert profile.draft_key == source.fingerprint.key
    output = generate(target, source, torch.tensor([[1, 2, 3]]), max_new_tokens=12, profile=profile)
    assert output.new_tokens == generate(target, None, torch.tensor([[1, 2, 3]]), max_new_tokens=12).new_tokens


def test_lower_precision_runs_in_the_targets_dtype(tmp_path):
    model = tiny_llama(3, vocab_size=12, sharpness=4.0).to(torch.bfloat16)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model, config={"norm_output": True}), target)
    assert source.logits_dtype == torch.bfloat16
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    plain = generate(target, None, prompt, max_new_tokens=30).new_tokens
    assert generate(target, source, prompt, tree=TREE, max_new_tokens=30).new_tokens == plain


def test_lookup_beside_a_head(tmp_path, monkeypatch):
    """Tokens that lookup proposed and the target accepted are rows of the head as well."""
    model = tiny_llama(3, vocab_size=12, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model), target)
    levels = recorded(monkeypatch)
    prompts = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6] * 4, [2, 7] * 16])
    options = {"max_new_tokens": 60, "eos_token_id": ()}
    plain = generate(target, None, prompts, **options).new_tokens
    output = generate(target, source, prompts, tree=TREE, lookup=True, **options)
    assert output.new_tokens == plain
    assert output.stats.copied_tokens > 10
    assert check_levels(source, model, output.sequences.tolist(), levels, [TREE] * 2) > 40


# Which hidden states ids mean


def marking_target(dtype=torch.float32):
    """A target of which hidden states 2 and 4 say what comes next, alike behind every token; 1 and 3 do not."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attention_bias=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        mark = torch.randn(32)
        for number, sign in ((1, 1), (2, -1), (3, 1)):
            model.model.layers[number].self_attn.o_proj.bias.copy_(20 * sign * mark)
    return adapt(model.to(dtype))


def passing_head(folder: Path, target, ids: tuple[int, ...], *, of_outputs: bool, **options) -> Path:
    """Write a head that hands its first feature on to the target's own head of logits."""
    where = {} if of_outputs else {"eagle_aux_hidden_state_layer_ids": list(ids)}
    write_head(
        folder, target.model, layer_ids=tuple(number + 1 for number in ids) if of_outputs else (0,) * len(ids),
        drop=("embed_tokens.weight",), config=where, **options,
    )  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"midlayer.{name}.weight"].zero_()
    weights["norm.weight"] = torch.ones_like(weights["norm.weight"])
    weights["fc.weight"] = torch.eye(32, 32 * len(ids))
    whole = target.model.lm_head.weight.detach().float()
    known = slice(None)
    if "d2t" in weights:
        known = weights["d2t"] + torch.arange(len(weights["d2t"]))
    weights["lm_head.weight"] = whole[known].clone()
    save_file(weights, folder / "model.safetensors")
    return folder


TEXT = torch.arange(40)[None] * 7 % 24


@pytest.mark.parametrize("vocab", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ids", "of_outputs", "documented", "taken"),
    [
        ((1,), True, (2,), (2,)),
        ((2,), True, (3,), (2,)),
        ((2,), False, (2,), (2,)),
        ((1,), False, (1,), (2,)),
    ],
)
def test_ids_are_read_by_what_the_head_makes_of_a_text(
    ids, of_outputs, documented, taken, dtype, vocab, tmp_path, caplog
):
    target = marking_target(dtype)
    folder = passing_head(tmp_path / "head", target, ids, of_outputs=of_outputs, draft_vocab_size=vocab)
    source = Eagle3Draft.from_folder(folder, target)
    assert (source.needs, source.reading) == (documented, None)
    options = {"tree": TREE, "max_new_tokens": 12, "eos_token_id": ()}
    with caplog.at_level("INFO", logger="sequoia_kernels"):
        output = generate(target, source, TEXT, **options)
        again = generate(target, source, TEXT, **options)
    plain = generate(target, None, TEXT, **options | {"tree": "auto"})
    assert output.new_tokens == again.new_tokens == plain.new_tokens
    assert output.stats.tokens_per_step > 3
    reading = source.reading
    assert (source.needs, reading.layers) == (taken, taken) and reading.is_documented == (documented == taken)
    assert reading.num_rows == 39 and reading.overlap > 0.5 > reading.other_overlap
    told = [record for record in caplog.records if "layer ids" in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO" if documented == taken else "WARNING"]
    assert f"{reading.overlap:.3f}" in told[0].getMessage() and f"{reading.other_overlap:.3f}" in told[0].getMessage()
    assert f"hidden states {taken[0]}," in repr(source)
    fixed = Eagle3Draft.from_folder(folder, target, feature_layers=documented)
    generate(target, fixed, TEXT, **options)
    assert (fixed.needs, fixed.reading) == (documented, None)


def test_the_overlap_is_the_chance_that_a_drawn_child_is_accepted(tmp_path):
    model = tiny_llama(3, vocab_size=12, num_layers=4, sharpness=4.0)
    target = adapt(model)
    source = Eagle3Draft.from_folder(write_head(tmp_path / "head", model, layer_ids=(1, 2)), target)
    tokens = torch.randint(12, (21,), generator=torch.Generator().manual_seed(1))
    source.meet_prompts(target, torch.stack((torch.zeros(21, dtype=torch.int64), tokens)), [18, 21])  # the longest
    with torch.no_grad():
        found = model(tokens[None], output_hidden_states=True)
    probs = found.logits[0].softmax(-1)
    reading = source.reading
    by_layers = {reading.layers: reading.overlap, reading.other: reading.other_overlap}
    assert set(by_layers) == {(1, 2), (0, 1)} and reading.is_documented == (reading.layers == (1, 2))
    for layers, overlap in by_layers.items():
        states = torch.cat([found.hidden_states[number][0] for number in layers], -1)
        fixed = Eagle3Draft.from_folder(tmp_path / "head", target, feature_layers=layers)
        rows = [
            chain_logits(fixed, states[:known], tokens[1 : known + 1], known)[-1].softmax(-1) for known in range(1, 21)
        ]
        expected = torch.minimum(torch.stack(rows), probs[1:]).sum(-1).mean()
        assert overlap == pytest.approx(float(expected), abs=1e-5)


def test_ids_of_heads_that_tell_nothing_are_read_as_documented(tmp_path, caplog):
    """A head that gives the same whatever it reads: not better by more than chance."""
    target = marking_target()
    folder = passing_head(tmp_path / "head", target, (1,), of_outputs=False)
    source = Eagle3Draft.from_folder(
        changed(folder, tmp_path / "deaf", weights={"fc.weight": torch.zeros(32, 32)}), target
    )
    with caplog.at_level("WARNING", logger="sequoia_kernels"):
        generate(target, source, TEXT, tree=TREE, max_new_tokens=4)
    assert source.needs == (1,) and source.reading.is_documented and not caplog.records
    assert source.reading.overlap == source.reading.other_overlap


def test_what_cannot_be_measured_stays_as_documented(tmp_path, caplog):
    target = marking_target()
    short = Eagle3Draft.from_folder(passing_head(tmp_path / "short", target, (1,), of_outputs=False), target)
    generate(target, short, TEXT[:, :16], tree=TREE, max_new_tokens=4)
    assert (short.needs, short.reading) == ((1,), None)
    generate(target, short, TEXT[:, :17], tree=TREE, max_new_tokens=4, lookup=True)  # a text that is long enough
    assert short.needs == (2,) and short.reading.num_rows == 16
    last = Eagle3Draft.from_folder(passing_head(tmp_path / "last", target, (4,), of_outputs=False), target)
    generate(target, last, TEXT, tree=TREE, max_new_tokens=4)
    assert (last.needs, last.reading) == ((4,), None)  # there is no hidden state 5
    beyond = passing_head(tmp_path / "beyond", target, (4,), of_outputs=True)
    with caplog.at_level("WARNING", logger="sequoia_kernels"):
        assert Eagle3Draft.from_folder(beyond, target).needs == (4,)
    assert "read as hidden states [4]" in caplog.text and "none up to 5" in caplog.text


def test_a_measured_head_is_what_plans_and_steps_are_kept_for(tmp_path):
    target = marking_target()
    source = Eagle3Draft.from_folder(passing_head(tmp_path / "head", target, (1, 1), of_outputs=False), target)
    before = source.identity, source.graph_key
    source.meet_prompts(target, TEXT, [40])
    assert source.needs == (2,) and source.identity != before[0] and source.graph_key != before[1]
    pinned = Eagle3Draft.from_folder(tmp_path / "head", target, feature_layers=(2, 2))
    assert pinned.identity == source.identity
