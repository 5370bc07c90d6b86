"""Documents: files are written whole, to where a path leads, with what was there kept; hostile text is refused."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import random
import stat
import subprocess
import sys
import threading

import pytest
from support.interrupts import interrupt_everywhere
from support.processes import run_process
from support.synthetic_profile import synthetic_profile

from sequoia_kernels import (
    AcceptanceEstimate,
    HardwareProfile,
    TokenTree,
    TreePlan,
    documents,
    estimate_acceptance,
    plan_tree,
)
from sequoia_kernels.documents import MAX_COUNT, Format, check_writable, is_count, is_number, write_bytes, write_text
from sequoia_kernels.errors import ProfileError, TreeFormatError
from sequoia_kernels.planner.evidence import AcceptanceEvidence

# ---- writing ----


def test_a_link_stays_and_leads_to_the_new_text(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    file, link, dangling = tmp_path / "there" / "file", tmp_path / "here" / "link", tmp_path / "here" / "dangling"
    file.write_text("old")
    link.symlink_to(file)
    dangling.symlink_to("../there/new")
    for path in (link, dangling):
        write_text(path, "new")
        assert path.is_symlink()
        assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path / "here")) == ["dangling", "link"]
    assert sorted(os.listdir(tmp_path / "there")) == ["file", "new"]


def test_a_link_laid_beforehand_is_not_followed(tmp_path):
    """A name that can be told from path and process could have been taken by somebody else's link."""
    path, victim = tmp_path / "tree.json", tmp_path / "victim"
    victim.write_text("precious")
    for name in (f".{path.name}.{os.getpid()}.part", f"{path.name}.tmp", f"{path.name}.partial"):
        (tmp_path / name).symlink_to(victim)
    TokenTree.single().save(path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_the_name_while_writing_is_new_each_time(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "replace", lambda source, destination: names.append(source))
    for _ in range(4):
        write_text(tmp_path / "file", "text")
    assert len(set(names)) == 4
    assert {os.path.dirname(name) for name in names} == {str(tmp_path)}


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o666])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"


def test_a_new_file_takes_the_mode_of_any_new_file(tmp_path):
    write_text(tmp_path / "ours", "text")
    (tmp_path / "theirs").write_text("text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_a_long_name(tmp_path):
    path = tmp_path / ("x" * 255)
    write_text(path, "text")
    write_text(path, "again")
    assert path.read_text() == "again"
    with pytest.raises(OSError, match=r"File name too long.*xxx"):
        write_text(tmp_path / ("x" * 256), "text")


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(path.read_text()), daemon=True)
    reader.start()
    check_writable(path)  # must not wait for the reader, nor take its place
    write_text(path, "text")
    reader.join(60)
    assert seen == ["text"]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_device_is_written_to(tmp_path):
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    write_text(link, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert link.is_symlink()


@pytest.mark.parametrize("to_file", [False, True], ids=["pipe", "file"])
def test_standard_output_takes_a_document_in_its_turn(tmp_path, to_file):
    script = (
        "from sequoia_kernels.documents import write_text, check_writable\n"
        "print('before')\n"
        "check_writable('/dev/stdout')\n"
        "write_text('/dev/stdout', 'document\\n')\n"
        "print('after')\n"
    )
    path = tmp_path / "out"
    with open(path, "w") as file:
        result = run_process([sys.executable, "-c", script], stdout=file if to_file else subprocess.PIPE)
    assert (path.read_text() if to_file else result.stdout) == "before\ndocument\nafter\n"


def test_a_folder_is_refused(tmp_path):
    for write in (lambda path: write_text(path, "text"), check_writable):
        with pytest.raises(IsADirectoryError, match=tmp_path.name):
            write(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"missing/file"):
            write(tmp_path / "missing" / "file")
        (tmp_path / "file").write_text("old")
        with pytest.raises(NotADirectoryError, match=r"file/file"):
            write(tmp_path / "file" / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_checking_changes_nothing(tmp_path):
    path = tmp_path / "file"
    check_writable(path)
    assert os.listdir(tmp_path) == []
    path.write_text("old")
    before = path.stat()
    check_writable(path)
    assert path.stat() == before
    assert os.listdir(tmp_path) == ["file"]


AS_A_USER = """
import os, tempfile
from sequoia_kernels.documents import check_writable, write_text
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "file")
    write_text(path, "old")
    os.chmod(path, 0o444)
    os.mkdir(os.path.join(folder, "closed"), 0o555)
    os.mkfifo(os.path.join(folder, "pipe"), 0o444)
    for call in (check_writable, lambda path: write_text(path, "new")):
        for refused in (path, os.path.join(folder, "closed", "file"), os.path.join(folder, "pipe")):
            try:
                call(refused)
            except PermissionError as error:
                assert error.filename == refused, error
            else:
                raise AssertionError(refused)
    assert open(path).read() == "old"
    assert sorted(os.listdir(folder)) == ["closed", "file", "pipe"]
"""


def test_what_may_not_be_written_is_not_replaced():
    run_process([sys.executable, "-c", AS_A_USER], timeout=300)


def test_a_failure_names_the_file_and_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_mounted_by_itself_is_written_to(tmp_path, monkeypatch):
    """Nothing can take its place. Only root can mount, so what the system says then is said here."""
    path = tmp_path / "file"

    def replace(source, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), source, None, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="busy") as refusal:
        write_text(path, "new")
    assert refusal.value.filename == str(path)
    path.write_text("old, and longer")
    before = path.stat().st_ino
    write_text(path, "new")
    assert (path.read_text(), path.stat().st_ino, os.listdir(tmp_path)) == ("new", before, ["file"])


@pytest.mark.parametrize("event", ["line", "opcode"])
def test_an_interrupt_at_any_place_leaves_one_whole_file(tmp_path, event):
    path = tmp_path / "file"
    seen = set()

    def work():
        path.write_text("old")
        path.chmod(0o600)
        write_text(path, "new")

    def check():
        seen.add(path.read_text())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.listdir(tmp_path) == ["file"]

    assert interrupt_everywhere(work, check, [documents], event) > 30
    assert seen == {"old", "new"}


def test_many_writers_and_a_reader_see_whole_files(tmp_path):
    path = tmp_path / "file"
    texts = [bytes([letter]) * 200_000 for letter in b"abcd"]
    write_bytes(path, texts[0])
    failures, done = [], threading.Event()

    def write(text):
        try:
            for _ in range(50):
                write_bytes(path, text)
        except BaseException as error:
            failures.append(error)

    def read():
        while not done.is_set():
            if path.read_bytes() not in texts:
                failures.append("a broken file")

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["file"]


# ---- reading ----


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("inf"), float("-inf"), float("nan"), True, False, None, "1", [1]]
)
def test_what_is_no_number(value):
    assert not is_number(value)


def test_numbers_and_counts():
    assert all(map(is_number, (0, -1.5, 1e308, 10**300)))
    assert is_count(MAX_COUNT)
    assert not any(map(is_count, (-1, 1.0, True, MAX_COUNT + 1, None, "1")))


FORMAT = Format("thing", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "thing", "version": 3, "a": {"b": 1, "b": 1}}', 'the field "b" appears twice'),
        ('{"format": "thing", "version": 3, "a": 1e999}', "1e999 is not a JSON number that a float64 can hold"),
        ('{"format": "thing", "version": 3, "a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"format": "thing", "version": 3.0}', 'must have "version": 3, got 3.0; make the file again'),
        ('{"format": "thing", "version": 4}', "got 4; upgrade sequoia-kernels to read it"),
        ('{"format": ["thing"], "version": 3}', 'must have "format": "thing", got a list of 1'),
        (f'{{"format": "{"x" * 1000}"}}', r"got \"x{50,60}\.\.\."),
        ("[" * 500 + "]" * 500, "must be a JSON object, got a list of 1"),
    ],
)
def test_texts_that_are_refused(text, message):
    with pytest.raises(ValueError, match=f"read: the document .*{message}") as caught:
        FORMAT.parse(text, "read")
    assert len(str(caught.value)) < 200


def test_only_text_is_parsed():
    with pytest.raises(TypeError, match="read: text must be a str, got bytes"):
        FORMAT.parse(b"{}", "read")


def test_fields_name_themselves_and_what_is_there():
    document = FORMAT.parse(FORMAT.dump({"inner": {"list": [{"count": 0}, {}], "word": "x" * 99}}), "read")
    inner = document.inside("inner")
    first, second = inner.objects("list")
    for call, message in (
        (lambda: first.count("count"), r"inner.list\[0\].count must be a positive integer, got 0"),
        (lambda: second.count("count"), r"inner.list\[1\].count must be a positive integer, got nothing"),
        (lambda: inner.count("word"), r"inner.word must be a positive integer, got \"xxx[^ ]*\.\.\.$"),
        (lambda: inner.inside("list"), r"inner.list must be an object, got a list of 2"),
        (lambda: document.objects("inner"), r"inner must be a list of objects, got an object"),
    ):
        with pytest.raises(ValueError, match=f"^read: {message}"):
            call()
    assert first.count("count", 0) == 0
    assert second.count("count", optional=True) is None


# ---- every document, changed at random ----

HOSTILE = [
    None, True, False, 0, -0.0, -1, -3, 0.5, 7, 1e-320, 1e300, -1e300, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400,
    "", "x", "1", "\ud800", "sequoia-kernels/tree", [], [[]], [0], [None], [1, 1], {}, {"": {}}, {"a": [1]},
]  # fmt: skip


def use_tree(tree):
    tree.draw()
    assert TokenTree.from_json(tree.to_json()) == tree


def use_plan(plan):
    plan.describe()
    assert plan.tokens_per_second > 0
    assert plan.no_speculation.tree.num_nodes == 1
    assert plan.best_chain is None or plan.best_chain.ms_per_token > 0
    assert TreePlan.from_json(plan.to_json()) == plan


def use_estimate(estimate):
    lower, upper = estimate.tokens_per_step_interval(TokenTree([-1, 0, 0, 1]))
    assert 1 <= lower <= upper
    assert AcceptanceEstimate.from_json(estimate.to_json()) == estimate
    estimate_acceptance([estimate, estimate])


def use_evidence(found):
    evidence, key = found
    assert AcceptanceEvidence.from_json(evidence.to_json(key)) == found
    evidence = evidence.with_run([30, 5], [25, 1])
    assert 0 < evidence.vector[0] < 1 and sum(evidence.vector) <= 1 + 1e-9
    assert evidence.spread > 0


def use_profile(profile):
    assert HardwareProfile.from_json(profile.to_json()) == profile
    profile.merged(profile)
    with contextlib.suppress(ValueError):  # what is needed may be gone: told, not crashed
        plan_tree([0.6, 0.2], profile, max_budget=6, max_levels=4).describe()


DOCUMENTS = {
    "tree": (TokenTree([-1, 0, 0, 1]).to_json(), TokenTree.from_json, TreeFormatError, use_tree),
    "plan": (
        plan_tree(estimate_acceptance(([200, 80], [120, 20])), synthetic_profile()).to_json(),
        TreePlan.from_json,
        ValueError,
        use_plan,
    ),
    "acceptance": (
        estimate_acceptance(
            [{"visited_by_rank": [100, 40, 30], "accepted_by_rank": [60, 10, 2]}] * 3,
            temperature=0.8, top_k=5, top_p=0.9, target="big", draft="small", extrapolate_to=5,
        ).to_json(),
        AcceptanceEstimate.from_json,
        ValueError,
        use_estimate,
    ),
    "profile": (synthetic_profile().to_json(), HardwareProfile.from_json, ProfileError, use_profile),
    "evidence": (
        AcceptanceEvidence().with_run([60, 20, 5], [40, 9, 1]).to_json({"target": "big"}),
        AcceptanceEvidence.from_json,
        ValueError,
        use_evidence,
    ),
}  # fmt: skip


def random_place(document, random_state):
    """An object or list somewhere in a document, and a key or index of it; shallow ones as often as deep ones."""
    owner, key = document, random_state.choice(list(document))
    while isinstance(owner[key], (dict, list)) and owner[key] and random_state.random() < 0.6:
        owner = owner[key]
        key = random_state.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    return owner, key


def changed(document, random_state):
    """The text of a document with one to three changes of values, or with a piece of its text gone or doubled."""
    document = copy.deepcopy(document)
    for _ in range(random_state.choice((1, 1, 1, 2, 3))):
        if not document:
            break
        owner, key = random_place(document, random_state)
        action = random_state.randrange(8)
        if action == 0:
            del owner[key]
        elif action == 1 and isinstance(owner, list):
            owner.insert(key, owner[key])
        elif action == 2:
            other, place = random_place(document, random_state)
            owner[key] = copy.deepcopy(other[place])
        elif action == 3 and is_number(owner[key]):
            owner[key] = owner[key] * random_state.choice((-1, 0, 1.5, 10, 10**9)) + random_state.choice((0, 1, -1))
        else:
            owner[key] = copy.deepcopy(random_state.choice(HOSTILE))
    text = json.dumps(document, indent=1)
    if random_state.randrange(6) == 0:
        start = random_state.randrange(len(text))
        stop = start + random_state.randrange(40)
        text = text[:start] + text[start:stop] * random_state.choice((0, 2)) + text[stop:]
    return text


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.filterwarnings("error")
def test_a_changed_document_loads_or_is_refused(kind, tmp_path):
    original, read, error, use = DOCUMENTS[kind]
    document = json.loads(original)
    random_state = random.Random(kind)
    loaded = 0
    for _ in range(600):
        text = changed(document, random_state)
        try:
            value = read(text)
        except error as refusal:
            assert type(refusal) is error
            assert len(str(refusal)) < 400
            assert "\n" not in str(refusal)
        else:
            loaded += 1
            use(value)
    assert loaded > 20  # changes that break no rule are among them
