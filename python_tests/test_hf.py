"""transformers' own `generate` with trees, and its settings in ours: the same text, the same distribution."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
import transformers
from support.chi_square import p_value, sequence_counts
from support.tiny_families import tiny_model
from support.tiny_models import noisy_copy, tiny_llama
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process, stopping_criteria

from sequoia_kernels import TokenTree, generate, hf
from sequoia_kernels.decoding.processors import REFUSED, ROW_WISE
from sequoia_kernels.decoding.settings import KNOWN, UNSUPPORTED, GenerationSettings

TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
VOCAB = 32
EOS = 7


@functools.cache
def pair(family: str):
    if family == "llama":
        target = tiny_llama(3, vocab_size=VOCAB, sharpness=4.0)
        draft = noisy_copy(target, 0.3)
    else:
        target, draft = (tiny_model(family, seed, vocab_size=VOCAB) for seed in (1, 2))
    for model in (target, draft):
        model.generation_config = GenerationConfig(eos_token_id=[EOS, 31], pad_token_id=0)
    return target, draft


def prompts() -> dict[str, torch.Tensor]:
    """Two prompts, the second one padded on the left."""
    ids = torch.randint(1, VOCAB - 1, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def only_even_behind_odd(batch_id: int, tokens: torch.Tensor) -> list[int]:
    return [token for token in range(VOCAB) if (token + batch_id) % 2 != int(tokens[-1]) % 2] + [EOS]


def watermark() -> transformers.generation.WatermarkingConfig:
    return transformers.generation.WatermarkingConfig(greenlist_ratio=0.4, bias=3.0, context_width=2)


# Each of transformers' settings that makes a processor: what is given.
GREEDY = {
    "plain": {},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[3], [5, 9], [12, 4]]},
    "sequence_bias": {"sequence_bias": {(4,): 2.0, (6, 8): 5.0, (10,): -4.0}},
    "min_length": {"min_length": 22, "suppress_tokens": [1], "sequence_bias": {(EOS,): 9.0}},
    "min_new_tokens": {"min_new_tokens": 11, "sequence_bias": {(EOS,): 9.0}},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (6, 1.6)},
    "forced_bos_token_id": {"forced_bos_token_id": 4},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "suppress_tokens": {"suppress_tokens": [2, 3, 5, 11, 17]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(12))},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": only_even_behind_odd},
    "watermarking_config": {"watermarking_config": watermark()},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "several": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 9, "suppress_tokens": [3]},
    "max_length": {"max_length": 19, "max_new_tokens": None},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_is_transformers(family, name, monkeypatch):
    target, draft = pair(family)
    settings = {"max_new_tokens": 24} | GREEDY[name]
    wanted = target.generate(**prompts(), **settings)
    as_transformers = {"custom_generate": hf.custom_generate, "assistant_model": draft, "tree": TREE}
    assert target.generate(**prompts(), **settings, **as_transformers).tolist() == wanted.tolist()
    for source in (draft, None, draft):
        output = generate(target, source, **prompts(), tree=TREE, **settings)
        assert output.sequences.tolist() == wanted.tolist()
        monkeypatch.setattr("sequoia_kernels.decoding.generation.SLOW_PARAMETERS", 0)  # the draft's logits as well


def test_each_setting_changes_the_text():
    """None of the cases above would be equal without its setting, on one of the two models."""
    plain = [pair(family)[0].generate(**prompts(), max_new_tokens=24).tolist() for family in ("llama", "gpt2")]
    same = [
        name
        for name, settings in GREEDY.items()
        if [
            pair(family)[0].generate(**prompts(), **({"max_new_tokens": 24} | settings)).tolist()
            for family in ("llama", "gpt2")
        ]
        == plain
    ]
    assert same == ["plain", "forced_bos_token_id", "remove_invalid_values"]  # a BOS is forced behind one token only


SAMPLED = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15, "temperature": 1.4},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.12},
    "eta_cutoff": {"eta_cutoff": 0.3},
    "top_h": {"top_h": 0.6},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.2, "temperature": 0.8, "top_k": 4},
    "repetition_penalty": {"repetition_penalty": 1.6, "temperature": 0.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "sequence_bias": {"sequence_bias": {(2,): 1.0, (3, 1): -3.0}, "top_k": 4},
    "watermarking_config": {"watermarking_config": watermark(), "top_p": 0.9},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [t for t in range(6) if t != ids[-1]]},
}
SMALL = 6
LENGTH = 3


def joint_of_transformers(target, prompt: torch.Tensor, settings: dict) -> torch.Tensor:
    """The probability of every continuation, by transformers' own processors, one prefix at a time."""
    settings = dict(settings)
    allowed = settings.pop("prefix_allowed_tokens_fn", None)
    config = GenerationConfig(
        do_sample=True,
        max_length=len(prompt) + LENGTH,
        num_beams=1,
        num_return_sequences=1,
        **({"top_k": 0} | settings),
    )
    target._prepare_special_tokens(config, device="cpu")
    processors = target._get_logits_processor(
        config, len(prompt), prompt[None], prefix_allowed_tokens_fn=allowed, device="cpu", model_kwargs={}
    )
    joint = torch.zeros([SMALL] * LENGTH, dtype=torch.float64)
    for path in itertools.product(range(SMALL), repeat=LENGTH):
        probability = torch.ones((), dtype=torch.float64)
        for depth, token in enumerate(path):
            ids = torch.cat((prompt, torch.tensor(path[:depth], dtype=torch.int64)))[None]
            with torch.inference_mode():
                logits = target(input_ids=ids).logits[:, -1].float()
            probability = probability * processors(ids, logits)[0].double().softmax(-1)[token]
            if not probability:
                break
        joint[path] = probability
    return joint


@functools.cache
def small_pair():
    target = tiny_llama(7, vocab_size=SMALL, sharpness=6.0)
    target.generation_config = GenerationConfig(pad_token_id=0)
    return target, noisy_copy(target, 0.4)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_text_has_transformers_joint_distribution(name, monkeypatch):
    if name == "top_h" and not hasattr(logits_process, "TopHLogitsWarper"):
        pytest.skip("this transformers has no top_h")
    target, draft = small_pair()
    prompt, num_samples = torch.tensor([2, 1, 4]), 4000
    settings = SAMPLED[name]
    joint = joint_of_transformers(target, prompt, settings)
    assert abs(float(joint.sum()) - 1) < 1e-5
    ids = prompt.repeat(num_samples, 1)
    output = generate(
        target,
        draft,
        ids,
        tree=TREE,
        max_new_tokens=LENGTH,
        seed=range(num_samples),
        **({"temperature": 1.0} | settings),
    )
    assert p_value(sequence_counts(torch.tensor(output.new_tokens), SMALL), joint) > 1e-4
    monkeypatch.setattr("sequoia_kernels.decoding.generation.SLOW_PARAMETERS", 0)  # the draft's logits as well
    torch.manual_seed(5)
    sequences = target.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=LENGTH,
        custom_generate=hf.custom_generate, draft=draft, tree=TREE, **({"top_k": 0} | settings),
    )  # fmt: skip
    assert p_value(sequence_counts(sequences[:, 3:], SMALL), joint) > 1e-4


@pytest.mark.parametrize("prefix", ["a function", "a processor"])
def test_nobodys_own_code_is_asked_about_a_text_that_it_forbids(prefix):
    target, draft = pair("llama")
    forbidden = {3, 5, 6, 9, 11, 20}
    allowed = [token for token in range(VOCAB) if token not in forbidden]
    seen = []

    def processor(input_ids, scores):
        seen.extend(input_ids[:, 9:].flatten().tolist())
        scores[:, sorted(forbidden)] = -torch.inf  # in place, as some do
        return scores

    def function(batch, ids):
        seen.extend(ids[9:].tolist())
        return allowed

    own = {"prefix_allowed_tokens_fn": function} if prefix == "a function" else {"logits_processor": [processor]}
    options = {"tree": TREE, "max_new_tokens": 40, "eos_token_id": ()}
    output = generate(target, draft, **prompts(), **options, **own)
    assert seen and not forbidden & set(seen)
    wanted = generate(target, draft, **prompts(), **options, suppress_tokens=sorted(forbidden))
    assert output.new_tokens == wanted.new_tokens


def test_processing_the_draft_accepts_more_of_the_same_text(monkeypatch):
    target, _ = pair("llama")
    options = {"tree": TREE, "max_new_tokens": 40, "eos_token_id": (), "suppress_tokens": [3, 5, 6, 9, 11, 20]}
    plain = generate(target, target, **prompts(), **options)
    monkeypatch.setattr("sequoia_kernels.decoding.generation.SLOW_PARAMETERS", 0)
    processed = generate(target, target, **prompts(), **options)
    assert processed.new_tokens == plain.new_tokens
    assert processed.stats.tokens_per_step == pytest.approx(4.0, abs=0.15)  # every step to the tree's depth
    assert plain.stats.tokens_per_step < processed.stats.tokens_per_step


def test_the_order_of_processors_is_transformers():
    target, _ = pair("llama")
    settings = {
        "sequence_bias": {(4,): 2.0}, "encoder_repetition_penalty": 1.5, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[3]], "min_length": 12,
        "min_new_tokens": 3, "forced_bos_token_id": 4, "forced_eos_token_id": 2, "remove_invalid_values": True,
        "exponential_decay_length_penalty": (6, 1.6), "suppress_tokens": [1], "begin_suppress_tokens": [3],
        "temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1, "top_h": 0.6, "watermarking_config": watermark(), "renormalize_logits": True,
    }  # fmt: skip
    ids = prompts()["input_ids"]
    config = GenerationConfig(
        do_sample=True, eos_token_id=EOS, max_length=20, num_beams=1, num_return_sequences=1, **settings
    )
    target._prepare_special_tokens(config, device="cpu")
    custom = [logits_process.SuppressTokensLogitsProcessor([9], device="cpu"), lambda ids, scores: scores]
    theirs = target._get_logits_processor(
        config, 9, ids, only_even_behind_odd, LogitsProcessorList(custom), device="cpu", model_kwargs={}
    )
    ours = GenerationSettings(target, config).processors(
        temperatures=[0.7, 0.7], top_k=[4, 4], top_p=[0.9, 0.9], prompts=ids, padding=None, eos_token_ids=[EOS],
        max_new_tokens=11, custom=custom, prefix_allowed_tokens_fn=only_even_behind_odd, all_in_processors=False,
    )  # fmt: skip
    assert [type(entry) for entry in ours.processors[0]] == [type(entry) for entry in theirs]
    assert ours.processors[0] is ours.processors[1]
    assert ours.scales == [0.7, 0.7]
    assert not ours.filters_in_ops


def test_every_processor_of_transformers_is_known():
    """A new class shows up here: it is taken row by row, refused, or asked about one request at a time."""
    classes = {
        name
        for name, entry in vars(logits_process).items()
        if inspect.isclass(entry) and issubclass(entry, logits_process.LogitsProcessor)
    }
    one_by_one = {
        "LogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
    }  # fmt: skip
    of_other_models = {name for name in classes if name.startswith(("Whisper", "Bark", "Dia", "AlternatingCodebooks"))}
    assert classes - of_other_models - one_by_one <= set(ROW_WISE) | set(REFUSED)


def test_every_setting_of_transformers_is_known():
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} <= KNOWN


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}, {"guidance_scale": 1.5}, {"output_attentions": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_tree_cannot_honour_is_refused_by_name(settings):
    target, draft = pair("llama")
    name = next(iter(settings))
    with pytest.raises(ValueError, match=rf"generate: {name} must be .*, got {settings[name]}"):
        generate(target, draft, **prompts(), tree=TREE, **settings)
    with pytest.raises(ValueError, match=rf"generate: {name} must be .*, got {settings[name]}"):
        target.generate(
            **prompts(), custom_generate=hf.custom_generate, draft=draft, tree=TREE, return_dict_in_generate=True,
            **settings,
        )  # fmt: skip
    configured = tiny_llama(0)
    for key, value in settings.items():
        setattr(configured.generation_config, key, value)
    with pytest.raises(ValueError, match=rf"{name} must be .* from the generation_config"):
        generate(configured, None, torch.tensor([[1, 2]]))


def test_neutral_values_are_not_refused():
    target, _ = pair("llama")
    neutral = {name: values[0] for name, (values, _) in UNSUPPORTED.items() if values}
    assert generate(target, None, **prompts(), max_new_tokens=2, **neutral).new_tokens


def test_names_that_nobody_knows():
    target, _ = pair("llama")
    with pytest.raises(
        TypeError, match=r"'repetition_penality' is no argument .*; did you mean 'repetition_penalty'\?"
    ):
        generate(target, None, **prompts(), repetition_penality=1.2)


def test_scores_and_logits_are_transformers():
    target, draft = pair("llama")
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for settings in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2, "max_new_tokens": 6}, {}):
        settings = {"max_new_tokens": 12} | settings
        theirs = target.generate(**prompts(), **settings, **asked)
        ours = target.generate(
            **prompts(), **settings, **asked, custom_generate=hf.custom_generate, draft=draft, tree=TREE
        )
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        ends = [(row == EOS) | (row == 31) for row in theirs.sequences[:, 9:]]
        lengths = [int(end.nonzero()[0]) + 1 if bool(end.any()) else len(end) for end in ends]
        for name in ("scores", "logits"):
            mine, its = getattr(ours, name), getattr(theirs, name)
            assert len(mine) == len(its)
            for step, (left, right) in enumerate(zip(mine, its, strict=True)):
                for row, length in enumerate(lengths):
                    if step < length:
                        torch.testing.assert_close(left[row], right[row], atol=2e-5, rtol=2e-5)
                    else:
                        assert not left[row].any()


def test_scores_of_sampled_tokens_are_those_of_the_processors():
    target, draft = pair("llama")
    config = {"temperature": 0.7, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.3}
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=9, output_scores=True, **config)
    row = output.sequences[0]
    with torch.inference_mode():
        for step, scores in enumerate(output.scores[0]):
            ids = row[None, : 9 + step]
            wanted = target(input_ids=ids).logits[:, -1].float()
            for processor in (
                logits_process.RepetitionPenaltyLogitsProcessor(1.3), logits_process.TemperatureLogitsWarper(0.7),
                logits_process.TopKLogitsWarper(5), logits_process.MinPLogitsWarper(0.05),
            ):  # fmt: skip
                wanted = processor(ids, wanted)
            torch.testing.assert_close(scores, wanted[0], atol=1e-4, rtol=1e-4)
            assert scores[row[9 + step]] > -torch.inf


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}, {"top_k": 6, "top_p": 0.9}])
def test_logprobs(temperature, settings):
    target, draft = pair("llama")
    options = {"tree": TREE, "max_new_tokens": 12, "temperature": temperature, **settings}
    wanted = generate(target, draft, **prompts(), **options, output_scores=True, output_logits=True)
    for kind, rows in (("raw", wanted.logits), ("processed", wanted.scores)):
        output = generate(target, draft, **prompts(), **options, return_logprobs=kind)
        for request in range(2):
            length = len(output.new_tokens[request])
            assert len(output.logprobs[request]) == length
            if output.new_tokens[request] != wanted.new_tokens[request]:
                assert temperature and settings  # filters in the op, or among the processors: draws on the edge differ
                continue
            tokens = torch.tensor(output.new_tokens[request])
            expected = rows[request].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(output.logprobs[request]), expected, atol=1e-4, rtol=1e-4)
    assert generate(target, draft, **prompts(), **options).logprobs is None
    with pytest.raises(ValueError, match=r"return_logprobs must be True, False, .*, got 'all'"):
        generate(target, draft, **prompts(), **options, return_logprobs="all")


def test_the_checkpoints_own_settings_hold():
    target = tiny_llama(3, vocab_size=VOCAB, sharpness=4.0)
    target.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=4, top_p=0.9, max_new_tokens=7, eos_token_id=EOS, pad_token_id=0
    )
    options = {"tree": TREE, "seed": 3}
    own = generate(target, target, **prompts(), **options)
    named = generate(target, target, **prompts(), **options, temperature=0.7, top_k=4, top_p=0.9, max_new_tokens=7)
    assert own.new_tokens == named.new_tokens
    assert max(map(len, own.new_tokens)) == 7
    greedy = target.generate(**prompts(), do_sample=False)
    assert generate(target, target, **prompts(), **options, do_sample=False).sequences.tolist() == greedy.tolist()
    assert generate(target, target, **prompts(), **options, temperature=0).sequences.tolist() == greedy.tolist()
    other = GenerationConfig(max_new_tokens=5, repetition_penalty=1.7)  # the rest is the checkpoint's
    wanted = generate(
        target, target, **prompts(), **options, temperature=0.7, top_k=4, top_p=0.9, max_new_tokens=5,
        repetition_penalty=1.7,
    )  # fmt: skip
    assert generate(target, target, **prompts(), **options, generation_config=other).new_tokens == wanted.new_tokens
    for bad, rule in ((0.5, "0 where do_sample=False"), (0, "above 0 where do_sample=True")):
        with pytest.raises(ValueError, match=f"temperature must be {rule}, got {bad}"):
            generate(target, target, **prompts(), **options, do_sample=not bad, temperature=bad)


def test_settings_of_sampling_do_not_touch_greedy_text():
    target, draft = pair("llama")
    wanted = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=20).new_tokens
    given = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=20, min_p=0.5, typical_p=0.3, eta_cutoff=0.2)
    assert given.new_tokens == wanted


class _Counted:
    """A processor that knows how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + self.calls * torch.arange(scores.shape[1])


class _RowBias:
    """A processor of a caller's own, with a row for each request."""

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == len(self.bias)
        return scores + self.bias * (1 + input_ids[:, -1:] % 3)


def test_processors_of_ones_own_see_the_requests_as_in_transformers():
    target, draft = pair("llama")
    own = _RowBias(torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)))
    wanted = target.generate(**prompts(), max_new_tokens=20, logits_processor=LogitsProcessorList([own]))
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=20, logits_processor=[own])
    assert output.sequences.tolist() == wanted.tolist()
    trees = [TREE, TokenTree([-1, 0, 0, 0, 1, 1, 3, 5])]
    output = generate(target, draft, **prompts(), tree=trees, max_new_tokens=20, logits_processor=[own])
    assert output.sequences.tolist() == wanted.tolist()


def test_processors_that_are_no_function_of_their_input_are_refused():
    target, draft = pair("llama")
    message = "must depend on input_ids and scores alone, got _Counted, which gave other scores when called again"
    with pytest.raises(ValueError, match=message):
        generate(target, draft, **prompts(), tree=TREE, logits_processor=[_Counted()])
    synth = transformers.generation.SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    with pytest.raises(ValueError, match="watermarking_config must not ask for SynthID"):
        generate(target, draft, **prompts(), tree=TREE, watermarking_config=synth)
    with pytest.raises(TypeError, match="logits_processor must be a list"):
        generate(target, draft, **prompts(), tree=TREE, logits_processor=_Counted())
    with pytest.raises(
        TypeError, match=r"logits_processor must hold what is called with \(input_ids, scores\), got int"
    ):
        generate(target, draft, **prompts(), tree=TREE, logits_processor=[3])


@pytest.mark.parametrize("with_draft", [False, True])
def test_a_row_without_a_token_left_is_an_error_where_it_is_reached(with_draft):
    target, draft = pair("llama")

    def ends(at):
        return lambda ids, scores: torch.full_like(scores, -torch.inf) if ids.shape[1] == at else scores

    options = {"tree": TREE, "eos_token_id": (), "max_new_tokens": 12}
    source = draft if with_draft else None
    ids = prompts()["input_ids"][:1]
    for at in (9, 12, 14):
        with pytest.raises(ValueError, match=rf"request 0 has none behind {at - 9} new tokens \(function\)"):
            generate(target, source, ids, **options, logits_processor=[ends(at)])
    # one behind the last token that is wanted is never asked for
    wanted = generate(target, source, ids, **options).new_tokens
    assert generate(target, source, ids, **options, logits_processor=[ends(21)]).new_tokens == wanted


def test_prefixes_behind_an_end_are_not_asked_about():
    target, draft = pair("llama")
    seen: list[list[int]] = []

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        seen.append(ids[9:].tolist())
        return list(range(VOCAB))

    for tree in (TREE, TokenTree.chain(6)):
        generate(target, draft, **prompts(), tree=tree, max_new_tokens=8, prefix_allowed_tokens_fn=allowed)
    assert seen
    assert not any(EOS in path or 31 in path or len(path) >= 8 for path in seen)


def test_deep_chains_have_paths():
    target, _ = pair("llama")
    chain = TokenTree.chain(1024)
    output = generate(
        target, target, prompts()["input_ids"][:1], tree=chain, max_new_tokens=6, suppress_tokens=[3], eos_token_id=()
    )
    assert len(output.new_tokens[0]) == 6


class _Ends(stopping_criteria.StoppingCriteria):
    """Ends a request where a token of a kind comes, and notes what it is shown."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.add((*input_ids.shape[:1], *input_ids[0, -1:].shape))
        return torch.tensor([int(row[-1]) % 5 == 4 for row in input_ids])


def test_stopping_criteria_end_requests_as_in_transformers():
    target, draft = pair("llama")
    wanted = target.generate(**prompts(), max_new_tokens=30, stopping_criteria=[_Ends()])
    criterion = _Ends()
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=30, stopping_criteria=[criterion])
    assert output.sequences.tolist() == wanted.tolist()
    assert "stopping_criteria" in output.finish_reasons
    assert criterion.shapes == {(1, 1)}
    custom = {"custom_generate": hf.custom_generate, "draft": draft, "tree": TREE}
    ours = target.generate(**prompts(), max_new_tokens=30, stopping_criteria=[_Ends()], **custom)
    assert ours.tolist() == wanted.tolist()
    with pytest.raises(TypeError, match="stopping_criteria must be a list of what is called"):
        generate(target, draft, **prompts(), tree=TREE, stopping_criteria=[3])


def test_max_time_ends_requests():
    target, draft = pair("llama")
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=400, eos_token_id=(), max_time=0.0)
    assert output.finish_reasons == ["max_time"] * 2
    custom = {"custom_generate": hf.custom_generate, "draft": draft, "tree": TREE}
    ours = target.generate(
        **prompts(), max_new_tokens=400, max_time=1e-9, return_dict_in_generate=True, eos_token_id=30, **custom
    )
    assert ours.finish_reasons == ["stopping_criteria"] * 2


def test_num_return_sequences():
    target, draft = pair("llama")
    options = {"tree": TREE, "max_new_tokens": 10, "temperature": 1.0}
    output = generate(target, draft, **prompts(), num_return_sequences=3, **options)
    assert output.sequences.shape[0] == 6
    assert len(output) == 6
    assert output.sequences[:3, :9].tolist() == prompts()["input_ids"][:1].repeat(3, 1).tolist()
    assert len({tuple(tokens) for tokens in output.new_tokens[:3]}) == 3
    custom = {"custom_generate": hf.custom_generate, "draft": draft, "tree": TREE}
    torch.manual_seed(0)
    ours = target.generate(**prompts(), do_sample=True, num_return_sequences=3, max_new_tokens=10, **custom)
    assert ours.shape[0] == 6
    torch.manual_seed(0)
    again = target.generate(**prompts(), do_sample=True, num_return_sequences=3, max_new_tokens=10, **custom)
    assert ours.tolist() == again.tolist()
    assert target.generate(
        **prompts(), do_sample=True, num_return_sequences=3, max_new_tokens=10, **custom
    ).tolist() != (ours.tolist())


class _Heard:
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ends = 0

    def put(self, tokens: torch.Tensor) -> None:
        assert not self.ends
        self.values.append(tokens.tolist())

    def end(self) -> None:
        self.ends += 1


def test_streamers_of_batches():
    target, draft = pair("llama")
    wanted, given = _Heard(), _Heard()
    sequences = target.generate(**prompts(), max_new_tokens=20, streamer=wanted)
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=20, streamer=given)
    assert output.sequences.tolist() == sequences.tolist()
    assert given.values == wanted.values
    each = [_Heard(), _Heard()]
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=20, streamer=each)
    for row, heard in enumerate(each):
        prompt = prompts()["input_ids"][row][prompts()["attention_mask"][row].bool()].tolist()
        assert heard.values == [[prompt], *([token] for token in output.new_tokens[row])]
        assert heard.ends == 1
    with pytest.raises(ValueError, match="streamer must be one or one for each of 2 requests, got 1"):
        generate(target, draft, **prompts(), tree=TREE, streamer=[_Heard()])
    ours = _Heard()
    custom = {"custom_generate": hf.custom_generate, "assistant_model": draft, "tree": TREE}
    target.generate(**prompts(), max_new_tokens=20, streamer=ours, **custom)
    assert ours.values == wanted.values
    assert ours.ends == 1


def test_output_indexes_as_a_tensor_does():
    target, draft = pair("llama")
    output = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=5)
    assert output[0].tolist() == output.sequences[0].tolist()
    assert output[1, 9:].tolist() == output.sequences[1, 9:].tolist()
    assert [row.tolist() for row in output] == output.sequences.tolist()
    output.sequences[0, 0] = 1  # not a tensor of inference mode
    target.generate(**prompts(), max_new_tokens=5, custom_generate=hf.custom_generate, draft=draft, tree=TREE)[0, 0] = 1


def test_trees_by_path(tmp_path):
    target, draft = pair("llama")
    path = tmp_path / "tree.json"
    TREE.save(path)
    wanted = generate(target, draft, **prompts(), tree=TREE, max_new_tokens=9)
    for given in (path, str(path)):
        output = generate(target, draft, **prompts(), tree=given, max_new_tokens=9)
        assert output.new_tokens == wanted.new_tokens
        assert output.stats.tree == TREE
        ours = target.generate(
            **prompts(), max_new_tokens=9, custom_generate=hf.custom_generate, draft=draft, tree=given,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert ours.stats.tree == TREE
    with pytest.raises(FileNotFoundError):
        generate(target, draft, **prompts(), tree=tmp_path / "none.json")


def test_what_transformers_drops_is_found_and_refused():
    target, draft = pair("llama")
    custom = {"custom_generate": hf.custom_generate, "tree": TREE, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="custom_generate: past_key_values must not be given, got DynamicCache"):
        target.generate(**prompts(), **custom, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="draft must be given once"):
        target.generate(**prompts(), **custom, draft=draft, assistant_model=draft)
    with pytest.raises(ValueError, match="position_ids must count the prompt's tokens from 0, got others"):
        target.generate(**prompts(), **custom, draft=draft, position_ids=torch.arange(9).expand(2, 9))
    embeds = target.get_input_embeddings()(prompts()["input_ids"])
    with pytest.raises(ValueError, match="custom_generate: inputs_embeds must not be given"):
        target.generate(inputs_embeds=embeds, **custom, draft=draft)


def test_without_a_draft_it_is_a_plain_loop():
    target, _ = pair("llama")
    ours = target.generate(**prompts(), max_new_tokens=9, custom_generate=hf.custom_generate)
    assert ours.tolist() == target.generate(**prompts(), max_new_tokens=9).tolist()


@pytest.mark.parametrize("ahead", [0, 1], ids=["read at once", "read a step late"])
def test_nothing_goes_on_behind_an_end_where_tokens_are_read_late(monkeypatch, ahead):
    monkeypatch.setattr("sequoia_kernels.decoding.loop.steps_ahead", lambda target: ahead)  # as on a GPU
    target, draft = pair("llama")
    options = {"tree": TREE, "max_new_tokens": 20, "eos_token_id": [22, 26]}
    plain = generate(target, draft, **prompts(), **options)
    assert max(map(len, plain.new_tokens)) < 20
    seen = []

    def allowed(batch, ids):
        seen.append(ids[9:].tolist())
        return list(range(VOCAB))

    output = generate(target, draft, **prompts(), **options, prefix_allowed_tokens_fn=allowed)
    assert output.new_tokens == plain.new_tokens
    assert not any({22, 26} & set(path) for path in seen)


def test_prefix_functions_are_given_the_prompts_index():
    target, draft = pair("llama")
    allowed = {0: [1, 2, 3], 1: [4, 5, 6]}
    output = generate(
        target, draft, **prompts(), tree=TREE, temperature=1.0, num_return_sequences=2, max_new_tokens=5,
        eos_token_id=(), prefix_allowed_tokens_fn=lambda batch, ids: allowed[batch],
    )  # fmt: skip
    assert [set(tokens) <= set(allowed[index // 2]) for index, tokens in enumerate(output.new_tokens)] == [True] * 4


@pytest.mark.parametrize("custom", [False, True])
def test_stopping_criteria_see_the_scores_that_are_returned(custom):
    target, draft = pair("llama")
    seen = []

    class Looks(stopping_criteria.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(scores[-1][0].clone())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 6, "output_scores": True, "tree": TREE}
    ids = prompts()["input_ids"][:1]
    if custom:
        output = target.generate(
            ids, custom_generate=hf.custom_generate, draft=draft, return_dict_in_generate=True,
            stopping_criteria=[Looks()], **options,
        )  # fmt: skip
        scores = [row[0] for row in output.scores]
    else:
        scores = list(generate(target, draft, ids, stopping_criteria=[Looks()], **options).scores[0])
    assert len(scores) == len(seen)
    assert all(torch.equal(mine, its) for mine, its in zip(scores, seen, strict=True))


def test_padding_and_ends_as_transformers_has_them():
    target = tiny_llama(3, vocab_size=VOCAB, sharpness=4.0)
    target.generation_config = GenerationConfig(eos_token_id=[26, 22, 9])
    custom = {"custom_generate": hf.custom_generate, "draft": target, "tree": TREE}
    wanted = target.generate(**prompts(), max_new_tokens=20)
    assert 26 in wanted[:, -1].tolist()
    assert target.generate(**prompts(), max_new_tokens=20, **custom).tolist() == wanted.tolist()
    assert generate(target, target, **prompts(), max_new_tokens=20, tree=TREE).sequences.tolist() == wanted.tolist()
    target.generation_config = GenerationConfig(eos_token_id=-1, pad_token_id=0)
    wanted = target.generate(**prompts(), max_new_tokens=6)
    assert target.generate(**prompts(), max_new_tokens=6, **custom).tolist() == wanted.tolist()


def test_masked_tokens_are_shown_as_they_are():
    target, draft = pair("llama")
    given = prompts()
    given["input_ids"][1, :4] = torch.tensor([18, 6, 18, 6])
    settings = {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "max_new_tokens": 20}
    wanted = target.generate(**given, **settings)
    assert generate(target, draft, **given, **settings, tree=TREE).sequences.tolist() == wanted.tolist()
    custom = {"custom_generate": hf.custom_generate, "draft": draft, "tree": TREE}
    assert target.generate(**given, **settings, **custom).tolist() == wanted.tolist()
    # padding on the right is moved to the left, as a tokenizer would have put it
    right = {name: tensor.clone() for name, tensor in prompts().items()}
    for tensor in right.values():
        tensor[1] = tensor[1].roll(-4)
    left = generate(target, draft, **prompts(), **settings, tree=TREE)
    assert generate(target, draft, **right, **settings, tree=TREE).new_tokens == left.new_tokens


def test_top_p_of_nothing_keeps_the_likeliest_token():
    target, draft = pair("llama")
    ids = prompts()["input_ids"][:1]
    custom = {"custom_generate": hf.custom_generate, "draft": draft, "tree": TREE}
    ours = target.generate(ids, do_sample=True, top_p=0.0, max_new_tokens=9, **custom)
    assert ours.tolist() == target.generate(ids, max_new_tokens=9).tolist()


@pytest.mark.parametrize(
    ("gives", "looks"),
    [(lambda ids, scores: None, "NoneType"), (lambda ids, scores: scores[:, :1], r"torch.float32 \[2, 1\]")],
)
def test_what_a_processor_must_give(gives, looks):
    target, draft = pair("llama")
    with pytest.raises(
        ValueError, match=rf"logits_processor must give scores of shape \[2, 32\], got {looks} from funct"
    ):
        generate(target, draft, **prompts(), tree=TREE, logits_processor=[gives])


def test_other_drafts_come_through_the_same_door(tmp_path):
    from sequoia_kernels.demo import load_demo_pair

    pair = load_demo_pair()
    ids = pair.tokenizer("x = 1\nx = 1\nx = 1\n", return_tensors="pt").input_ids
    wanted = pair.target.generate(ids, do_sample=False, max_new_tokens=24)
    pair.draft.save_pretrained(tmp_path)
    for options in (
        {"draft": "lookup"},
        {"draft": pair.draft, "lookup": True},
        {"draft": "layers:2"},
        {"draft": str(tmp_path)},
    ):
        output = pair.target.generate(
            ids, do_sample=False, max_new_tokens=24, custom_generate=hf.custom_generate, **options
        )
        assert torch.equal(output, wanted), options
