"""Captures that cannot be, each in a process of its own: what one leaves behind is felt by whatever comes next.

Skipped without a CUDA device; written without one. Each script fails by an error of its own.
"""

from __future__ import annotations

import sys

import pytest
from support.processes import python_environment, run_process

pytestmark = pytest.mark.gpu

SECONDS = 300  # to import torch and compile a few kernels, on a machine with other work

START = """
import gc, logging, threading, warnings
import torch
from sequoia_kernels import TokenTree, cuda_graphs, generate, release_engines
from sequoia_kernels.cuda_graphs import CaptureError, capture

device = torch.device("cuda", 0)
numbers = torch.zeros(4, device=device)


def refusal(call, **options):
    try:
        capture(call, device, **options)
    except CaptureError as error:
        return error
    raise AssertionError("it was captured")


def check_that_all_is_well():
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert not torch.cuda.is_current_stream_capturing()
    torch.randn(8, device=device).sum().item()  # neither allocator nor generator is in a capture any more
    pinned = torch.empty(8, pin_memory=True)
    pinned.copy_(torch.randn(8, device=device), non_blocking=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    numbers.zero_()
    graph, _ = capture(lambda: numbers.add_(torch.rand(4, device=device) + 1), device, undo=numbers.zero_)
    for _ in range(3):
        graph.replay()
    assert 3 <= numbers.min().item() <= numbers.max().item() <= 6
    assert torch.rand(4, device=device).unique().numel() == 4


"""

SCRIPTS = {
    "what waits is found before": """
error = refusal(lambda: numbers.add_(1).sum().item())
assert "it waits for the device at" in str(error) and error.lasting, error
""",
    "what waits in a model's own way is found before": """
for call in (
    lambda: torch.nonzero(numbers),
    lambda: numbers[numbers > 0],
    lambda: numbers.cpu(),
    lambda: torch.ones(3).to(device),
    lambda: bool(numbers.max() > 3),
):
    assert "it waits for the device at" in str(refusal(call))
""",
    "what waits only while it is captured": """
def call():
    made = numbers + torch.rand(4, device=device)
    if torch.cuda.is_current_stream_capturing():
        made.sum().item()
    return numbers.add_(made)

error = refusal(call, undo=numbers.zero_)
assert error.lasting and "captur" in str(error).lower(), error
assert numbers.tolist() == [0.0] * 4
del error
torch.cuda.empty_cache()
reserved = torch.cuda.memory_reserved()
for _ in range(3):
    refusal(call, undo=numbers.zero_)
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() <= reserved  # no memory is lost in captures
""",
    "what becomes invalid without an error": """
def call():
    numbers.add_(1)
    if torch.cuda.is_current_stream_capturing():
        try:
            numbers.sum().item()
        except RuntimeError:
            pass

assert "became invalid" in str(refusal(call, undo=numbers.zero_))
""",
    "what fails by itself": """
def call():
    numbers.add_(1)
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("the reason")

error = refusal(call, undo=numbers.zero_)
assert str(error) == "the reason" and isinstance(error.__cause__, ValueError)
assert numbers.tolist() == [0.0] * 4
""",
    "what launches nothing": """
warnings.simplefilter("error")
assert "launched nothing" in str(refusal(lambda: None))
""",
    "other threads that wait": """
stop = threading.Event()
errors = []

def wait():
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            while not stop.is_set():
                torch.ones(1 << 20, device=device).sum().item()
        except BaseException as error:
            errors.append(error)

thread = threading.Thread(target=wait)
thread.start()
try:
    for _ in range(20):
        capture(lambda: numbers.add_(1), device, undo=numbers.zero_)
finally:
    stop.set()
    thread.join()
assert not errors, errors
""",
    "a mixture of experts": """
from sequoia_kernels import adapt
from support.tiny_families import tiny_model
from support.tiny_models import tiny_llama

class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

records = Records()
logging.getLogger("sequoia_kernels").addHandler(records)
target = tiny_model("mixtral").to(device)  # float32: its experts are counted on the host
vocab = target.config.vocab_size
draft = tiny_llama(0, vocab_size=vocab).to(device)
prompt = torch.arange(9, device=device)[None]
options = {"tree": TokenTree([-1, 0, 0, 1]), "max_new_tokens": 20, "eos_token_id": ()}
for drafter in (None, draft):
    launched = generate(target, drafter, prompt, cuda_graphs=False, **options).new_tokens
    for _ in range(3):
        assert generate(target, drafter, prompt, **options).new_tokens == launched
said = [message for message in records.messages if "capture is off" in message]
assert len(said) == cuda_graphs.refused(adapt(target)), said
""",
    "two threads that generate": """
from support.tiny_models import noisy_copy, tiny_llama

pairs = []
for seed in range(2):
    target = tiny_llama(seed, vocab_size=61)
    pairs.append((target.to(device), noisy_copy(target, 0.5).to(device)))
prompt = torch.arange(9, device=device)[None]
options = {"tree": TokenTree([-1, 0, 0, 1, 1]), "max_new_tokens": 40, "eos_token_id": ()}
expected = [generate(*pair, prompt, cuda_graphs=False, **options).new_tokens for pair in pairs]
found, errors = [None, None], []

def run(index):
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[index] = generate(*pairs[index], prompt, **options).new_tokens
    except BaseException as error:
        errors.append(error)

for _ in range(3):
    release_engines()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert found == expected
""",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failed_capture_leaves_nothing_behind(script):
    code = START + SCRIPTS[script] + "\ncheck_that_all_is_well()\n"
    run_process([sys.executable, "-c", code], env=python_environment(), timeout=SECONDS)
