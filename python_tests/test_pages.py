"""The pages: their code is code that runs, and their links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from support.bench_scripts import cli_page
from support.eagle_heads import write_head
from support.engines.client import engine_environment
from support.examples import EXAMPLES
from support.processes import launched, python_environment, run_process

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.cli import command_parser
from sequoia_kernels.drafts import Eagle3Draft
from sequoia_kernels.planner.lookup import LookupCosts

REPOSITORY = EXAMPLES.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OWN_LOOP = REPOSITORY / "docs" / "own_loop.md"
ELSEWHERE = ("vllm", "openai")  # in an environment of its own: docs/serving.md runs there


def code_blocks(page: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def stretches(source: str, num_lines: int) -> set[str]:
    """Every stretch of so many lines, as far to the left as it goes."""
    lines = source.splitlines(keepends=True)
    return {textwrap.dedent("".join(lines[start : start + num_lines])) for start in range(len(lines) - num_lines + 1)}


def test_the_code_of_own_loops_is_that_of_the_examples() -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.py"))]
    blocks = code_blocks(OWN_LOOP)
    assert len(blocks) > 8
    strange = [block for block in blocks if not any(block in stretches(code, block.count("\n")) for code in sources)]
    assert strange == []


def test_every_example_is_on_the_page() -> None:
    text = OWN_LOOP.read_text(encoding="utf-8")
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.name not in text] == []


def test_every_name_of_interop_is_on_the_page() -> None:
    interop = importlib.import_module("sequoia_kernels.interop")
    functions = [name for name in interop.__all__ if name[0].islower()]
    assert [name for name in functions if name not in OWN_LOOP.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_parses_and_imports_what_there_is(page: Path) -> None:
    for block in code_blocks(page):
        try:
            tree = ast.parse(block)
        except SyntaxError:  # the end of a function
            tree = ast.parse("def function():\n" + textwrap.indent(block, "    "))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module not in ELSEWHERE:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def heading_anchors(page: Path) -> set[str]:
    """How links name the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in heading_anchors(target)):
            broken.append(link)
    assert broken == []


# ---- docs/cli.md ----


def test_the_reference_of_the_command_line_is_what_the_parser_says() -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli_page.markdown(), f"docs/cli.md is out of date: run {cli_page.COMMAND}"


def test_the_reference_has_every_option_with_words_and_every_example_parses() -> None:
    page = cli_page.markdown()
    parsers = cli_page.commands()
    assert len(parsers) > 7
    for name, parser in parsers.items():
        example = shlex.split(re.findall(rf"^## {name}\n.*?^```bash\nsequoia-kernels (.*?)\n```", page, re.M | re.S)[0])
        assert command_parser().parse_args(example).command == example[0] == name
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                assert action.help, f"{name} {action.dest} has no help"
                assert f"| `{(action.option_strings or [action.dest])[0]}" in page


# ---- docs/troubleshooting.md ----

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"
HOLE = "\0"  # what an f-string or a format fills in


def text_of(node: ast.AST | None) -> str:
    """The text of a string or f-string, with holes; a hole for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) if isinstance(value, ast.Constant) else HOLE for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return HOLE


def calls_of(tree: ast.AST, *names: str) -> list[ast.Call]:
    """The calls of functions and methods of these names."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", None)) in names]


def source_texts() -> list[str]:
    """The texts of the package's code, and what refusals make of theirs: name must rule, got actual."""
    found = []
    for path in [REPOSITORY / "setup.py", *sorted((REPOSITORY / "sequoia_kernels").rglob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                found.append(text_of(node))
        variables: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                variables.setdefault(node.targets[0].id, [HOLE]).append(text_of(node.value))
        for call in calls_of(tree, "_refuse", "fail_range", "refuse"):
            choices = [variables.get(getattr(argument, "id", ""), [text_of(argument)]) for argument in call.args]
            choices += 3 * [[HOLE]]
            for texts in itertools.product(*choices[:4]):
                found.append(f"{HOLE}: {texts[0]} must {texts[1]}, got {texts[2]}")
                found.append(f"{texts[0]}: {texts[1]} must {texts[2]}, got {texts[3]}")
    native = "\n".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "csrc").rglob("*.cpp")))
    return [*found, *re.findall(r'"((?:[^"\\]|\\.)*)"', native)]


def quoted_messages() -> list[str]:
    """The messages of the page, the first cells of its tables."""
    return re.findall(r"^\| `(.*?)` \|", TROUBLESHOOTING.read_text(encoding="utf-8"), re.MULTILINE)


def is_in(message: str, text: str) -> bool:
    """Whether a text, holes and all, can be the message: its fragments stand there in their order."""
    place = 0
    for fragment in message.split("..."):
        place = text.find(fragment, place)
        if place < 0:
            return False
        place += len(fragment)
    return True


def test_every_quoted_message_is_in_the_source() -> None:
    messages, texts = quoted_messages(), source_texts()
    assert len(messages) > 100 and len(messages) == len(set(messages))
    assert [message for message in messages if max(map(len, message.split("..."))) < 7] == []  # words, not dots
    assert [message for message in messages if not any(is_in(message, text) for text in texts)] == []
    assert not any(is_in("a message that ... nobody wrote", text) for text in texts)


def test_every_warning_and_every_refusal_of_the_command_line_is_quoted() -> None:
    messages = quoted_messages()
    expected = []
    for path in [REPOSITORY / "setup.py", *sorted((REPOSITORY / "sequoia_kernels").rglob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in calls_of(tree, "BadUsage", "BuildError", "warning", "warn_once"):
            text = max((text_of(argument) for argument in call.args), key=len)
            if len(text.replace(HOLE, "")) > 12:
                expected.append(text)
    assert len(expected) > 30
    assert [text for text in expected if not any(is_in(message, text) for message in messages)] == []


# ---- docs/choosing_a_tree.md ----


def test_the_code_on_choosing_a_tree_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """From top to bottom, as a reader would paste it."""
    page = REPOSITORY / "docs" / "choosing_a_tree.md"
    blocks = code_blocks(page)
    assert len(blocks) > 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    printed = capsys.readouterr().out
    assert "Do not speculate" in printed
    assert printed.count("tokens per step") >= 5 and printed.count(" tokens/s\n") == 2


# ---- docs/choosing_a_draft.md ----


def test_the_code_on_choosing_a_draft_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From top to bottom, as a reader would paste it; with a head of random weights in place of a published one."""
    # A machine that other work shares may measure that copied rows do not pay.
    costs = LookupCosts.alike([TokenTree.single()], 16, [0])
    monkeypatch.setattr("sequoia_kernels.decoding.generation.choose_lookup", lambda *_, **__: costs)
    demo = importlib.import_module("sequoia_kernels.demo")
    page = REPOSITORY / "docs" / "choosing_a_draft.md"
    text = "\n".join(code_blocks(page))
    for there, here in (
        ("models/llama-3.1-8b-instruct", demo.demo_pair_folder() / "target"),
        ("heads/eagle3-llama-3.1-8b-instruct", write_head(tmp_path / "head", demo.load_demo_pair().target)),
    ):
        assert there in text
        text = text.replace(there, str(here))
    names: dict[str, Any] = {}
    exec(compile(text, str(page), "exec"), names)
    copied = re.search(r"(\d+) of \d+ steps copied (\d+) tokens", capsys.readouterr().out)
    assert copied and int(copied[1]) > 0 and int(copied[2]) > 0
    assert isinstance(names["draft"], Eagle3Draft)
    new_tokens = generate(names["target"], None, names["prompt"], max_new_tokens=200).new_tokens
    assert names["output"].new_tokens == new_tokens


# ---- docs/transformers.md ----

TRANSFORMERS = REPOSITORY / "docs" / "transformers.md"


def test_the_code_on_transformers_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xgrammar")
    blocks = code_blocks(TRANSFORMERS)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(TRANSFORMERS), "exec"), names)
    printed = capsys.readouterr().out
    assert "def read_config(path):" in printed and "torch.Size([1, 512])" in printed
    assert printed.rstrip().endswith(("['\"file\"']", "['\"folder\"']"))


def test_the_page_on_transformers_names_every_setting() -> None:
    settings = importlib.import_module("sequoia_kernels.decoding.settings")
    text = TRANSFORMERS.read_text(encoding="utf-8")
    unsaid = {name for name in settings.KNOWN - settings._WITHOUT_EFFECT if f"`{name}`" not in text}
    assert unsaid == {"assistant_ensemble_weight"}  # of assisted generation with two models' mixed probabilities


# ---- pages whose code speaks of models that are not here: the demo pair takes their place ----


def demo_names(tmp_path: Path) -> dict[str, object]:
    """What the pages take for granted: the demo pair and short prompts for it."""
    demo = importlib.import_module("sequoia_kernels.demo")
    pair = demo.load_demo_pair()
    prompt = pair.tokenizer("def main(argv):\n    ", return_tensors="pt").input_ids
    TokenTree([-1, 0, 0, 1]).save(tmp_path / "tree.json")
    return {"target": pair.target, "draft": pair.draft, "input_ids": prompt, "prompt": prompt, "prompts": [prompt] * 2}


def test_the_code_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = importlib.import_module("sequoia_kernels.demo").demo_pair_folder()
    names: dict[str, object] = {}
    blocks = code_blocks(REPOSITORY / "README.md")
    assert len(blocks) == 2
    for block in blocks:
        for role in ("target", "draft"):
            block = block.replace(f"path/or/id/of/{role}", str(folder / role))
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "The sequoia is" in printed and "tokens per forward of the target" in printed
    assert names["tree"].num_nodes == 16  # type: ignore[attr-defined]


def test_the_code_on_recorded_and_shaped_trees_runs(tmp_path: Path) -> None:
    for page, imports in (
        ("robustness.md", ""),
        (
            "planner.md",
            "from sequoia_kernels import measure_profile, plan_tree\n"
            "from sequoia_kernels.decoding import record_steps\n"
            "profile = measure_profile(target, draft, context_lens=[32], quick=True)\n",
        ),
    ):
        (block,) = code_blocks(REPOSITORY / "docs" / page)
        names = demo_names(tmp_path)
        exec(compile(imports + block, page, "exec"), names)
        per_step = names["records"].tokens_per_step(TokenTree.chain(3), "sequoia")  # type: ignore[attr-defined]
        assert 1 < per_step <= 3
    assert names["plan"].rule == "traversal"  # type: ignore[attr-defined]


def test_the_code_on_offloading_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = importlib.import_module("sequoia_kernels.demo").demo_pair_folder()
    names = demo_names(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks(REPOSITORY / "docs" / "offloading.md")
    for there, here in (
        ("meta-llama/Llama-2-7b-hf", str(folder / "draft")),
        ("/models/Llama-2-70b-hf", str(folder / "target")),
        ("torch.bfloat16", "torch.float32"),
        ('"cuda"', '"cpu"'),
    ):
        assert there in block
        block = block.replace(there, here)
    exec(compile(block, "offloading.md", "exec"), names)
    assert names["output"].stats.tokens_per_step > 1  # type: ignore[attr-defined]


def test_the_code_on_adapters_runs(tmp_path: Path) -> None:
    """With a stand-in for the adapters themselves, which python_tests/models/test_peft.py has."""
    names = demo_names(tmp_path)
    calls: list[str] = []
    model = names["model"] = names["target"]
    model.set_adapter = calls.append  # type: ignore[attr-defined]
    model.disable_adapter = contextlib.nullcontext  # type: ignore[attr-defined]
    (block,) = code_blocks(REPOSITORY / "docs" / "models.md")
    exec(compile(block, "models.md", "exec"), names)
    assert calls == ["contracts", "poems"]
    assert names["first"].new_tokens == names["third"].new_tokens  # type: ignore[attr-defined]


def test_the_code_on_several_gpus_runs(tmp_path: Path) -> None:
    """On one rank, which needs neither accelerate nor torchrun; `test_parallel.py` runs nearly the same on two."""
    folder = importlib.import_module("sequoia_kernels.demo").demo_pair_folder()
    (block,) = code_blocks(REPOSITORY / "docs" / "several_gpus.md")
    assert block.count('"models/') == 3
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code = block.replace('"models/', f'"{folder.as_posix()}/')
    result = run_process([sys.executable, "-c", code], env=python_environment(**ranks), cwd=tmp_path)
    assert len(result.stdout) > 100


def test_no_page_has_code_that_does_not_run() -> None:
    run = {"README.md", "choosing_a_draft.md", "choosing_a_tree.md", "models.md", "offloading.md", "own_loop.md",
           "planner.md", "robustness.md", "serving.md", "several_gpus.md", "transformers.md"}  # fmt: skip
    assert {page.name for page in PAGES if code_blocks(page)} == run


# ---- docs/serving.md ----

SERVING = REPOSITORY / "docs" / "serving.md"


def test_everything_that_an_engine_refuses_is_on_the_page_on_serving() -> None:
    page = " ".join(SERVING.read_text(encoding="utf-8").split())
    tree = ast.parse((REPOSITORY / "sequoia_kernels" / "vllm" / "support.py").read_text(encoding="utf-8"))
    rows = [node for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) == 3]
    names = [row.elts[0].value for row in rows if isinstance(row.elts[0], ast.Constant)]
    assert len(names) > 12
    assert [name for name in names if str(name) not in page] == []


def test_everything_that_an_engine_is_told_and_reports_is_on_the_page_on_serving() -> None:
    page = SERVING.read_text(encoding="utf-8")
    arguments = inspect.signature(importlib.import_module("sequoia_kernels.vllm").engine_args).parameters
    runner = ast.parse((REPOSITORY / "sequoia_kernels" / "vllm" / "runner.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(runner) if isinstance(node, ast.FunctionDef)}
    asked = {node.attr for node in ast.walk(functions["decodes_trees"]) if isinstance(node, ast.Attribute)}
    (counts,) = (call.args[0] for call in calls_of(functions["init_trees"], "fromkeys"))
    reported = {node.value for node in ast.walk(functions["tree_report"]) if isinstance(node, ast.Constant)}
    reported |= {node.value for node in ast.walk(counts) if isinstance(node, ast.Constant)}
    assert len(asked) > 8 and len(reported) > 10
    words = {name for name in (*arguments, *reported) if re.fullmatch(r"[a-z_]+", str(name))}
    assert sorted(name for name in words if f"`{name}`" not in page) == []
    penalties = {name.replace("_penalty", "") for name in asked if name.endswith("_penalty")}
    others = {f"`{name}`" for name in asked if not name.endswith("_penalty")}
    assert sorted(name for name in penalties | others if name not in page) == []


@pytest.mark.slow
def test_the_code_on_serving_runs(tmp_path: Path) -> None:
    """As a reader would paste it, in vLLM's environment: an engine; a server with both clients and its metrics."""
    if "SEQUOIA_VLLM_PYTHON" not in os.environ:
        pytest.skip("SEQUOIA_VLLM_PYTHON names no interpreter that has vLLM")
    python = Path(os.environ["SEQUOIA_VLLM_PYTHON"])
    demo = importlib.import_module("sequoia_kernels.demo")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    text = SERVING.read_text(encoding="utf-8").replace("localhost:8000", f"localhost:{port}")
    for role in ("target", "draft"):
        text = text.replace(f"path/or/id/of/{role}", str(demo.demo_pair_folder() / role))
    engine, client, report = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shell = [block.strip() for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    (serve,) = (block for block in shell if block.startswith("flags=") and str(demo.demo_pair_folder()) in block)
    asks = [block for block in shell if block.startswith("curl")]
    assert len(asks) == 3
    variables = engine_environment(
        tmp_path,
        PATH=f"{python.parent}:{os.environ['PATH']}",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_SERVER_DEV_MODE="1",
        VLLM_LOGGING_LEVEL="INFO",
    )
    script = tmp_path / "script.py"

    def run(command: list[str]) -> str:
        return run_process(command, env=variables, cwd=tmp_path, timeout=900).stdout

    script.write_text(engine + textwrap.indent(report, "    "), encoding="utf-8")
    assert re.search(
        r"[1-9]\d* trees, [1-9]\d* accepted, [1-9]\d* pages free\n\{'[12]': ", run([str(python), str(script)])
    )

    log = tmp_path / "server.log"
    with log.open("w") as stream:
        command = [
            "bash",
            "-c",
            serve.replace("python -m vllm", "exec python -m vllm").replace("--model", f"--port {port} --model"),
        ]
        server = subprocess.Popen(
            launched(command), env=variables, cwd=tmp_path, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 900
        while run_process(["curl", "-sf", f"http://localhost:{port}/health"], check=False).returncode:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(1)
        answer = json.loads(run(["bash", "-c", asks[0].replace("curl", "curl -s", 1)]))
        script.write_text(client, encoding="utf-8")
        assert answer["usage"]["completion_tokens"] == 64
        assert run([str(python), str(script)]).rstrip("\n") == answer["choices"][0]["text"].rstrip("\n")  # equal seeds
        accepted = re.search(
            r"^vllm:spec_decode_num_accepted_tokens_total.* ([\d.]+)$", run(["bash", "-c", asks[1]]), re.M
        )
        assert accepted is not None and float(accepted[1]) > 10
        assert json.loads(run(["bash", "-c", asks[2]]))["results"][0]["accepted"] > 10
        assert "MiB of pages for" in log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
