"""vLLM's own server with trees: many streams at once, one that is broken off, one that is refused."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.engines.client import PAIR, end_group, engine_environment, vllm_python
from support.processes import launched, run_process

pytestmark = pytest.mark.all_engines

START_SECONDS = 300.0
NUM_TOKENS = 48
FLAGS = "import json, sys; from sequoia_kernels.vllm import server_flags; print(json.dumps(server_flags(sys.argv[1])))"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """vLLM's server in a process of its own."""

    def __init__(self, folder) -> None:
        environment = engine_environment(folder, VLLM_ENABLE_V1_MULTIPROCESSING="1")
        command = [vllm_python(), "-c", FLAGS, str(PAIR / "draft")]
        flags = json.loads(run_process(command, env=environment, cwd=folder).stdout.splitlines()[-1])
        self.port, self.log = free_port(), folder / "server.log"
        command = [
            vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(PAIR / "target"), "--port",
            str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs",
            "16", "--enforce-eager", "--served-model-name", "demo", *flags,
        ]  # fmt: skip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                launched(command), env=environment, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            end_group(self.process)
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if self.request("GET", "/health")[0] == 200:
                    return
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-5000:]
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-5000:]
            time.sleep(0.5)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Ask and read the whole answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def stream(self, prompt: list[int], stop_after: int | None = None, **params: Any) -> str:
        """Read a text as it comes; break off after so many pieces."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True, **params}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        pieces = []
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps({"ignore_eos": True, **body}), headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                text = line.decode().strip()
                if not text.startswith("data: ") or text == "data: [DONE]":
                    continue
                pieces += [choice["text"] for choice in json.loads(text.removeprefix("data: "))["choices"]]
                if stop_after is not None and len(pieces) >= stop_after:
                    break
        return "".join(pieces)


@pytest.fixture(scope="module")
def server(folder):
    running = Server(folder)
    yield running
    end_group(running.process)


def metrics(server: Server) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in server.request("GET", "/metrics")[1].splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


def test_nine_streams_are_what_plain_vllm_says(server, plain, prompts):
    expected = plain.generate(prompts, [{"max_tokens": NUM_TOKENS}] * 9)
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(server.stream, prompt) for prompt in prompts]
        broken_off = pool.submit(server.stream, prompts[2][:50], stop_after=3, max_tokens=400)
        too_long = pool.submit(
            server.request, "POST", "/v1/completions", {"model": "demo", "prompt": [5] * 2000, "max_tokens": 5}
        )
        assert [stream.result() for stream in streams] == [output["text"] for output in expected]
        broken_off.result()
        assert too_long.result()[0] == 400


def test_what_was_broken_off_ends_and_trees_were_accepted(server, prompts):
    deadline = time.monotonic() + 60
    while metrics(server)["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    values = metrics(server)
    assert values["vllm:num_requests_running"] == 0
    assert values["vllm:spec_decode_num_accepted_tokens_total"] > 0


def test_a_seed_gives_the_same_text_in_company(server, prompts):
    sampled = {"temperature": 0.9, "seed": 11}
    alone = server.stream(prompts[1], **sampled)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.stream, prompt) for prompt in prompts[3:6]]
        assert pool.submit(server.stream, prompts[1], **sampled).result() == alone
        for other in others:
            other.result()
