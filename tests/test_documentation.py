"""The README under test: its commands, flags, files and code blocks, and the script that repeats its test command."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import eval.qa
from jraggym.data.benchmarks import BENCHMARKS
from jraggym.recipes.qa import check
from jraggym.retrieval.presets import preset_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [block.replace("\\\n", " ") for language, block in BLOCKS if language == "sh"]
LINES = [line for block in SHELL for line in block.splitlines() if line.strip()]
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
MAIN = SETUP + ". && python -m train.quickstart --out runs/quickstart"
TEST = SETUP + "'.[test,offline]' && pytest"


def our_commands():
    """(file, words) of each command in the README that runs a file of ours."""
    found = []
    for command in re.split(r"\s+(?:&&|--)\s+", " && ".join(LINES)):  # what follows a bare -- is a command, too
        words = shlex.split(command)
        if words[:2] == ["python", "-m"]:
            found.append((words[2].replace(".", "/") + ".py", words))
        elif words[0] == "python":
            found.append((words[1], words))
    return found


COMMANDS = our_commands()


@pytest.fixture(scope="module")
def help_of():
    """A function that gives a file's help text; each file is run once."""
    texts = {}

    def read(file, capsys, monkeypatch, *experiment):
        key = (file, *experiment)
        if key not in texts:
            monkeypatch.setattr(sys, "argv", [*key, "--help"])
            monkeypatch.syspath_prepend(str((ROOT / file).parent))  # as python does
            with pytest.raises(SystemExit) as exit_:
                runpy.run_path(str(ROOT / file), run_name="__main__")
            assert exit_.value.code == 0, f"{' '.join(key)} --help failed: {capsys.readouterr().err}"
            texts[key] = capsys.readouterr().out
        return texts[key]

    return read


def test_both_one_line_commands_stand_in_blocks_of_their_own():
    assert ("sh", MAIN + "\n") in BLOCKS
    assert ("sh", TEST + "\n") in BLOCKS


def test_the_readme_shows_all_entries():
    shown = {file for file, _ in COMMANDS}
    entries = {
        path.relative_to(ROOT).as_posix()
        for folder in ("train", "eval", "tests/benchmarks")
        for path in (ROOT / folder).glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    assert shown == entries, "an entry without a command in the README, or a command without a file"


def flags(text):
    """The flags in a help text; those of nested fields have dots."""
    return set(re.findall(r"--[\w-]+(?:\.[\w-]+)*", text))


SHOWN = [  # the entries whose flags the text names
    (("train/quickstart.py",), ()),
    (("train/export.py",), ()),
    (("train/transcripts.py",), ("search-r1-ppo",)),
    (("train/evidence.py",), ()),
    (("train/chunk.py",), ()),
    (("eval/qa.py",), ("server",)),
    (("train/launch.py",), ("tpu-vm",)),
    *(((f"train/{name}.py",), ("synthhop",)) for name in ("sft", "critic", "grpo")),
]


@pytest.mark.parametrize(("file", "words"), COMMANDS, ids=[" ".join(words[1:]) for _, words in COMMANDS])
def test_a_command_has_only_known_flags(file, words, help_of, capsys, monkeypatch):
    assert (ROOT / file).is_file(), f"the README runs {file}, which does not exist"
    experiment = [word for word in words[3:4] if words[1] == "-m" and not word.startswith("--")]
    known = flags(help_of(file, capsys, monkeypatch, *experiment))
    named = {word.split("=")[0] for word in words if word.startswith("--")}
    assert named <= known, f"{file} does not know {', '.join(sorted(named - known))}"


ASKING = [words[3:] for file, words in COMMANDS if file == "eval/qa.py"]


@pytest.mark.parametrize("words", ASKING, ids=[" ".join(words) for words in ASKING])
def test_an_evaluation_names_all_that_it_needs(words):
    qa = tyro.extras.overridable_config_cli(eval.qa.EXPERIMENTS, args=words)
    check(qa)
    if qa.benchmark != "synthhop":
        known = BENCHMARKS[qa.benchmark]
        assert qa.data_dir is not None
        assert qa.split in {*known.files, *known.parts}
    assert qa.retriever != "preset" or (qa.encoder is not None and preset_of(qa.benchmark))


def test_flags_named_in_the_text_are_known(help_of, capsys, monkeypatch):
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    known = flags("".join(help_of(*words, capsys, monkeypatch, *more) for words, more in SHOWN))
    named = set(re.findall(r"`(--[\w.-]+)[ `]", text))
    assert len(named) > 10
    assert named <= known, f"no entry knows {', '.join(sorted(named - known))}"


def test_every_file_of_the_map_exists():
    paths = re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE)
    assert len(paths) > 15, "the file map was not found"
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_record_is_the_one_of_the_code():
    from jraggym.batch import ProcessBatch

    (block,) = (block for language, block in BLOCKS if language == "text" and block.startswith("ProcessBatch\n"))
    assert [line.split()[0] for line in block.splitlines()[1:]] == list(ProcessBatch.__dataclass_fields__)


# What asks a server runs in test_ask.py and test_agent_critic.py, with a scripted model in its place.
PYTHON = [block for language, block in BLOCKS if language == "python" and "Server(" not in block]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_a_python_block_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_a_python_block():
    assert PYTHON


def test_the_changelog_names_the_version():
    import jraggym

    assert f"## [{jraggym.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def run_ci(tmp_path, failing=""):
    """Runs .ci/run with programs that only write down how they were called; gives the process and their log."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    for name in ("python3", "pip", "pytest", "ruff", "mypy"):
        lines = ["#!/bin/sh", f'echo "{name} $*" >> "{log}"']
        if name == "python3":  # python3 -m venv FOLDER
            lines += ['mkdir -p "$3/bin"', ': > "$3/bin/activate"']
        lines += [f"exit {int(name == failing)}"]
        (programs / name).write_text("\n".join(lines) + "\n")
        (programs / name).chmod(0o755)
    scratch = tmp_path / "a scratch folder"
    scratch.mkdir()
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(scratch)}
    process = subprocess.run([ROOT / ".ci" / "run"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert list(scratch.iterdir()) == [], "the scratch folder was not removed"
    return process, log.read_text().splitlines()


def test_ci_runs_the_readmes_test_command_and_the_linters(tmp_path):
    process, log = run_ci(tmp_path)
    assert process.returncode == 0, process.stderr
    assert TEST.replace(".venv", '"$scratch/venv"') in process.stdout
    assert log[0].startswith(f"python3 -m venv {tmp_path / 'a scratch folder'}/")
    rest = ["pip install -e .[test,offline]", "pytest ", "ruff check .", "ruff format --check .", "mypy "]
    assert log[1:] == rest


@pytest.mark.parametrize("failing", ["python3", "pip", "pytest", "ruff", "mypy"])
def test_ci_fails_with_its_parts(tmp_path, failing):
    process, log = run_ci(tmp_path, failing)
    assert process.returncode == 1
    assert log[-1].startswith(failing), "it went on after a failure"


def test_no_path_of_a_machine_is_in_any_file():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(rb"(?<![\w.*])/(?:work|root|home)/\w")
    files = [ROOT / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name]
    assert ROOT / "README.md" in files
    assert [str(file) for file in files if file.is_file() and machine.search(file.read_bytes())] == []
