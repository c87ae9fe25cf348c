"""The documentation against the code: its tables of names, its commands, links, files and tests, and the README's Python.

A table that is compared stands behind a comment ``<!-- table: NAME -->``; a Python block of the README that is run behind one of
``<!-- test: quick -->`` (in this process's place), ``process`` (starts learners) and ``by_hand`` (a script with a syncer of its own).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from lightning_diloco.cli.main import _build_parser
from lightning_diloco.config import SyncConfig
from lightning_diloco.protocol import identity, learner_state, members, messages, records, recovery
from lightning_diloco.protocol.rounds import FragmentRound
from tests import doc_pages as docs
from tests.citizen.cases import CASES
from tests.doc_pages import ROOT

PROTOCOL, OPTIONS, INVARIANTS, DEPENDENCIES = (f"docs/{name}.md" for name in ("protocol", "options", "invariants", "dependencies"))
ALL_PAGES = [docs.name_of(page) for page in docs.PAGES]
PACKAGE_FOLDERS = ("protocol", "outer", "metrics", "runtime", "strategy", "sim", "cli")

NAMED = {
    "learner stages": get_args(learner_state.Stage),
    "member stages": get_args(members.Stage),
    "recovery stages": get_args(recovery.Stage),
    "refusals": get_args(identity.Refusal),
    "discards": get_args(identity.DiscardReason),
    "leave reasons": get_args(identity.LeaveReason),
    "outcomes": get_args(records.Outcome),
    "tape events": tuple(kind.__struct_config__.tag for kind in get_args(records.Record)),
}
COMPARED = {
    *((PROTOCOL, name) for name in (*NAMED, "round stages", "messages")),
    *((OPTIONS, name) for name in ("sync options", "strategy options", "commands")),
    *((DEPENDENCIES, name) for name in ("dependencies", "test dependencies")),
    ("README.md", "some options"),
    (INVARIANTS, "invariants"),
    ("docs/lightning.md", "lightning"),
}


def strategy_defaults() -> dict[str, Any]:
    from lightning_diloco import DecoupledDiLoCoStrategy

    parameters = inspect.signature(DecoupledDiLoCoStrategy.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in sync_defaults()}


def sync_defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(SyncConfig)}


# ---- tables ---------------------------------------------------------------------------------------------------------------------


def test_every_marked_table_is_compared():
    assert docs.marked_tables() == COMPARED


@pytest.mark.parametrize("name", NAMED)
def test_a_table_lists_the_names_of_the_code(name):
    listed = [docs.codes(row[0])[0] for row in docs.table(PROTOCOL, name)]
    assert sorted(listed) == sorted(NAMED[name])


def test_stages_of_a_round_are_those_of_the_code():
    rows = docs.table(PROTOCOL, "round stages")
    stages = set(get_args(get_type_hints(FragmentRound)["stage"]))
    assert {docs.codes(row[0])[0] for row in rows} == stages
    assert {re.split(r"[ ;]", row[2])[0] for row in rows} == stages


def test_messages_are_listed_with_sender_and_channel():
    expected = {
        **{kind.__name__: ("learner", "control") for kind in get_args(messages.FromLearner)},
        **{kind.__name__: ("learner", "bulk") for kind in get_args(messages.LearnerHeader)},
        **{kind.__name__: ("syncer", "control") for kind in get_args(messages.FromSyncer)},
        **{kind.__name__: ("syncer", "bulk") for kind in get_args(messages.SyncerHeader)},
        "PeerState": ("learner, syncer", "bulk"),
        messages.FromObserver.__name__: ("observer", "control"),
        **{kind.__name__: ("syncer", "control") for kind in get_args(messages.ToObserver)},
    }
    assert {docs.codes(row[0])[0]: (row[1], row[2]) for row in docs.table(PROTOCOL, "messages")} == expected


def test_reasons_of_a_refused_join_are_in_the_code():
    (sentence,) = re.findall(r"`JoinRefused` has reasons of its own: (.*?), each", docs.text_of(PROTOCOL), re.S)
    admission = (ROOT / "lightning_diloco/protocol/admission.py").read_text("utf-8")
    admission = admission.replace("(ID_IN_USE,", f'("{messages.ID_IN_USE}",')
    in_code = set(re.findall(r'(?:return|_turn_away\(member,|\[\],) \(?\s*"(\w+)",', admission))
    assert {name for name in docs.codes(sentence)} == in_code


@pytest.mark.parametrize(("name", "defaults"), [("sync options", sync_defaults), ("strategy options", strategy_defaults)])
def test_every_option_is_listed_with_its_default(name, defaults):
    listed = {docs.codes(row[0])[0]: ast.literal_eval(docs.codes(row[1])[0]) for row in docs.table(OPTIONS, name)}
    assert listed == defaults()
    assert list(listed) == list(defaults())


def test_the_short_table_of_options_agrees_with_the_code():
    defaults = {**sync_defaults(), **strategy_defaults()}
    rows = docs.table("README.md", "some options")
    assert rows
    for row in rows:
        names, values = docs.codes(row[0]), docs.codes(row[1])
        assert {n: ast.literal_eval(v) for n, v in zip(names, values, strict=True)} == {n: defaults[n] for n in names}


def commands() -> dict[str, Any]:
    """Every subcommand with its parser."""
    (action,) = [a for a in _build_parser()._actions if hasattr(a, "choices") and a.choices]
    return dict(action.choices)


def test_commands_are_listed_with_their_options():
    rows = {docs.codes(row[0])[0]: row[1] for row in docs.table(OPTIONS, "commands")}
    assert set(rows) == set(commands())
    for name, parser in commands().items():
        listed = set(re.findall(r"--[\w-]+", rows[name]))
        assert listed <= set(parser._option_string_actions), name


def test_what_works_is_what_the_tests_run():
    assert docs.first_codes("docs/lightning.md", "lightning") == [*CASES]


@pytest.mark.parametrize("name", ["dependencies", "test dependencies"])
def test_dependencies_are_those_of_the_project_with_the_pinned_versions(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = project["dependencies"] if name == "dependencies" else project["optional-dependencies"]["test"]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    listed = {docs.codes(row[0])[0]: row[1] for row in docs.table(DEPENDENCIES, name)}
    assert sorted(listed) == sorted(re.match(r"[\w-]+", line)[0] for line in wanted)
    assert listed == {package: pinned[package] for package in listed}


# ---- what is named exists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    for target in docs.links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in docs.anchors(docs.name_of(found)), f"{page}: {target}"


@pytest.mark.parametrize("page", ALL_PAGES)
def test_files_and_tests_that_are_named_exist(page):
    tops = tuple(f"{p.name}/" for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "outputs")
    inner = tuple(f"{name}/" for name in PACKAGE_FOLDERS)
    for span in docs.spans(page):
        path, _, test = span.partition("::")
        if not re.fullmatch(r"[\w./-]+", path) or not path.startswith((*tops, *inner)):
            continue
        found = ROOT / (path if path.startswith(tops) else f"lightning_diloco/{path}")
        assert found.exists(), f"{page} names {path}"
        if test:
            assert test in docs.names_of_tests(path), f"{page} names {span}"


def test_every_invariant_names_where_it_is_enforced_and_a_test_that_shows_it():
    for invariant, _, enforced, shown in docs.table(INVARIANTS, "invariants"):
        modules, tests = docs.codes(enforced), docs.codes(shown)
        assert modules or enforced == "all", invariant
        assert all((ROOT / "lightning_diloco" / module).exists() for module in modules), invariant
        assert tests, invariant
        for test in tests:
            path, _, name = test.partition("::")
            assert name in docs.names_of_tests(path), f"{invariant}: {test}"


def all_commands() -> Iterator[tuple[str, str]]:
    """(page, command) in bash blocks and in backticks."""
    yield from docs.shell_lines()
    for page in ALL_PAGES:
        for span in docs.spans(page):
            if re.match(r"(make|lightning-diloco|python|\.venv/bin/\S+) [\w.-]", span):
                yield page, span


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = {(page, word) for page, line in all_commands() for word in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {word for _, word in named} >= {"train", "test", "test-all", "check"}
    assert [(page, word) for page, word in sorted(named) if word not in targets] == []


def test_commands_that_are_named_can_be_called():
    found = 0
    for page, line in all_commands():
        words = shlex.split(line)
        program, arguments = words[0].rpartition("/")[2], words[1:]
        if program == "lightning-diloco" and arguments[0] != "COMMAND":
            assert arguments[0] in {*commands(), "--version"}, f"{page}: {line}"
            if len(arguments) > 1:
                _build_parser().parse_args(arguments)
                found += 1
        elif program == "python" and arguments[0] == "-m" and arguments[1] != "pytest":
            assert (ROOT / (arguments[1].replace(".", "/") + ".py")).exists(), f"{page}: {line}"
        elif program == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).exists() or arguments[0] == "my_script.py", f"{page}: {line}"
        elif program == "pip":
            named = [after for word, after in itertools.pairwise(arguments) if word == "-c"]
            assert named and all((ROOT / name).exists() for name in named), f"{page}: {line}"
        elif program in ("torchrun", "kubectl") or "sbatch" in words:
            assert page == "docs/sites.md", f"{page}: {line}"  # run by tests/sites
        elif program not in ("lightning-diloco", "make", "python", "ruff"):
            pytest.fail(f"{page}: nobody checks {line!r}")
    assert found >= 2


def test_values_of_the_recipe_that_are_named_exist():
    from hydra import compose, initialize_config_dir

    named = [argument for _, line in all_commands() if "ARGS=" in line for argument in shlex.split(shlex.split(line)[-1].partition("=")[2])]
    values = [argument for argument in named if re.match(r"\+?[a-z_.]+=", argument)]
    assert "data.path=my_text.txt" in values
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        compose("config", overrides=[*dict.fromkeys(v.partition("=")[0] + "=1" for v in values), "recipe=gpt_text"])
        compose("config", overrides=[span for span in docs.spans("README.md") if span.startswith("+strategy.")])


# ---- the README's Python --------------------------------------------------------------------------------------------------------


def python_of(mark: str) -> str:
    (block,) = [b for b in docs.blocks("README.md") if b.language == "python" and b.mark == mark]
    return block.code


def run_script(path: Path, *arguments: str) -> str:
    """Run a script as a reader would; returns what it printed."""
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, cwd=path.parent, env=environment(), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_every_python_block_is_python_and_the_readmes_are_run():
    for page in ALL_PAGES:
        for block in docs.blocks(page):
            if block.language == "python":
                compile(block.code, page, "exec")
                assert page != "README.md" or block.mark in ("quick", "process", "by_hand")


@pytest.mark.slow
def test_the_inline_example_runs(tmp_path):
    script = tmp_path / "inline.py"
    script.write_text(python_of("quick"))
    assert run_script(script).splitlines()[-1] == "finished"
    assert (tmp_path / "outputs" / "latest" / "global.safetensors").exists()


@pytest.mark.process
def test_the_ten_lines_run_and_write_what_the_readme_says(tmp_path):
    script = tmp_path / "ten_lines.py"
    script.write_text(python_of("process"))
    merges = int(run_script(script).splitlines()[-1].split()[0])
    assert merges > 0
    run_dir = tmp_path / "outputs" / "latest"
    files = re.findall(r"^\| `([\w./]+)` \|", docs.text_of("README.md").partition("## The run directory")[2], re.M)
    assert len(files) == 8
    assert [name for name in files if not (run_dir / name).exists()] == []


@contextmanager
def syncer(run_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The README's syncer, with the endpoint that it prints."""
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--bind", "tcp://127.0.0.1:0", "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        endpoint = re.search(r"syncer='(tcp://127\.0\.0\.1:\d+)'", line)
        assert endpoint is not None, line
        assert line.replace(endpoint[1], "tcp://127.0.0.1:PORT") in " ".join(docs.text_of("README.md").split())
        yield process, endpoint[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.process
def test_the_example_by_hand_runs_with_two_learners(tmp_path):
    script = tmp_path / "learner.py"
    script.write_text(python_of("by_hand"))
    with syncer(tmp_path / "run") as (process, endpoint):
        commands = [[sys.executable, str(script), endpoint, str(i)] for i in range(2)]
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        learners = [subprocess.Popen(command, **options) for command in commands]
        try:
            assert [learner.wait(100) for learner in learners] == [0, 0]
            assert process.wait(20) == 0
        finally:
            for learner in learners:
                learner.kill()
                learner.wait()
    assert (tmp_path / "run" / "global.safetensors").exists()
