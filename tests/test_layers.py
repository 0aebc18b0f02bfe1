"""The architecture as a test: who may import whom, what no module may do, and how long code may grow.

A module imports only from lower rows. In the same row it may import a module that it is plainly built on: those
pairs are listed in SIBLINGS, one by one, and never form a circle.
"""

import ast
import fnmatch
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jraggym", "train", "eval", "configs")
MAX_FILE, MAX_FUNCTION = 300, 80

# module pattern -> row; the first pattern that matches counts
ROWS = {
    "jraggym": 4,  # the package's own face: hands out `make` when asked
    **dict.fromkeys(
        (
            f"jraggym.{name}"
            for name in ("types", "errors", "batch", "metrics", "sharding", "whole", "chat_model", "hosts", "roll_call")
        ),
        0,
    ),
    **dict.fromkeys(("jraggym.preemption", "jraggym.history", "jraggym.clock", "jraggym.watch"), 0),
    "jraggym.data.lazy": 0,
    "jraggym.meter": 2,
    **dict.fromkeys(("jraggym.text.batching", "jraggym.text.chat", "jraggym.retrieval.dense"), 2),
    "jraggym.text.grouping": 2,
    **dict.fromkeys((f"jraggym.retrieval.{name}" for name in ("hybrid", "presets", "milvus", "sharded")), 2),
    **dict.fromkeys(("jraggym.sampling", "jraggym.selection", "jraggym.environment", "jraggym.objectives*"), 2),
    **dict.fromkeys((f"jraggym.{name}*" for name in ("models", "text", "retrieval", "agents", "data")), 1),
    **dict.fromkeys((f"jraggym.{name}" for name in ("gym", "rollout", "episodes", "labelling", "training")), 3),
    **dict.fromkeys((f"jraggym.{name}" for name in ("host_calls", "turn_sampling")), 2),
    **dict.fromkeys((f"jraggym.{name}" for name in ("transcript_*", "served_rollout")), 3),
    **dict.fromkeys((f"jraggym.{name}" for name in ("experience", "gathering", "onpolicy", "steps")), 3),
    "jraggym.recorded_gathering": 3,
    **dict.fromkeys(("jraggym.model_folder", "jraggym.porting.pretrained"), 3),
    **dict.fromkeys(("jraggym.protocols*", "jraggym.transcripts"), 1),
    "jraggym.rewards*": 2,
    "jraggym.porting*": 2,
    **dict.fromkeys(("jraggym.chats.endpoint", "jraggym.chats.connection"), 2),
    **dict.fromkeys((f"jraggym.chats.{name}" for name in ("local", "critic", "opening")), 3),
    "jraggym.chats*": 1,
    **dict.fromkeys((f"jraggym.{name}" for name in ("checkpoint", "evaluation", "collection", "scripted")), 3),
    **dict.fromkeys(("jraggym.agent_episodes", "jraggym.agent_records", "jraggym.episode_log", "jraggym.ask"), 3),
    "jraggym.launching*": 1,
    **dict.fromkeys(("jraggym.evidence.training", "jraggym.evidence.limits"), 3),  # built on the episodes of row 2
    "jraggym.evidence*": 2,
    "jraggym.sources*": 3,
    "jraggym.recipes*": 3.5,  # whole workflows on the blocks of row 3
    "jraggym.planning.programs": 3.7,  # abstract runs of the recipes
    "jraggym.planning.plan": 3.7,
    "jraggym.planning.abstract": 3,
    "jraggym.planning*": 1,
    "configs*": 3.75,
    "train*": 4,
    "eval*": 4,
}

# (importer, imported) of the same row, where the first is built on the second
SIBLINGS = [
    ("configs.grpo_synthhop_steps", "configs.grpo_synthhop_outcome"),
    ("jraggym.text.*", "jraggym.text.actions"),
    ("jraggym.text.tokenizer", "jraggym.text.rendering"),
    ("jraggym.text.huggingface", "jraggym.text.tokenizer"),
    ("jraggym.text.tokenizer_export", "jraggym.text.tokenizer"),
    ("jraggym.text.tokenizer_export", "jraggym.text.rendering"),
    ("jraggym.text.chat", "jraggym.text.batching"),
    ("jraggym.text.stop_strings", "jraggym.text.tokenizer"),
    ("jraggym.models.slots", "jraggym.models.*"),
    ("jraggym.turn_sampling", "jraggym.sampling"),
    ("jraggym.transcript_*", "jraggym.episodes"),
    ("jraggym.transcript_*", "jraggym.transcript_episode"),
    ("jraggym.transcript_rollout", "jraggym.transcript_episodes"),
    ("jraggym.transcript_gathering", "jraggym.gathering"),
    ("jraggym.transcript_gathering", "jraggym.rollout"),
    ("jraggym.transcript_gathering", "jraggym.transcript_rollout"),
    ("jraggym.served_rollout", "jraggym.episodes"),
    ("jraggym.served_rollout", "jraggym.transcript_episode"),
    ("jraggym.text.grouping", "jraggym.text.batching"),
    ("jraggym.protocols", "jraggym.protocols.*"),
    ("jraggym.protocols.*", "jraggym.protocols.protocol"),
    ("jraggym.protocols.validity", "jraggym.protocols.reading"),
    ("jraggym.protocols.*", "jraggym.agents.*"),
    ("jraggym.protocols.*", "jraggym.text.actions"),
    ("jraggym.rewards", "jraggym.rewards.*"),
    ("jraggym.rewards.*", "jraggym.rewards.finished"),
    ("jraggym.rewards.*", "jraggym.rewards.answer"),
    ("jraggym.rewards.*", "jraggym.rewards.form"),
    ("jraggym.rewards.*", "jraggym.rewards.combine"),
    ("jraggym.rewards.*", "jraggym.rewards.evidence"),
    ("jraggym.retrieval.*", "jraggym.retrieval.corpus"),
    ("jraggym.retrieval.hybrid", "jraggym.retrieval.dense"),
    ("jraggym.retrieval.sharded", "jraggym.retrieval.dense"),
    ("jraggym.retrieval.sharded", "jraggym.host_calls"),
    ("jraggym.retrieval.presets", "jraggym.retrieval.hybrid"),
    ("jraggym.retrieval.presets", "jraggym.retrieval.milvus"),
    ("jraggym.data.synthhop*", "jraggym.data.synthhop.*"),
    ("jraggym.data.synthhop.*", "jraggym.data.plan"),
    ("jraggym.data.process*", "jraggym.data.process.*"),
    ("jraggym.data.process.dataset", "jraggym.data.array_record"),
    ("jraggym.data.*", "jraggym.data.questions"),
    ("jraggym.data.*", "jraggym.retrieval.corpus"),
    ("jraggym.data.twowiki", "jraggym.data.hotpotqa"),
    ("jraggym.data.benchmarks", "jraggym.data.*"),
    ("jraggym.retrieval.vectors", "jraggym.retrieval.encoder"),
    ("jraggym.retrieval.base", "jraggym.retrieval.encoder"),
    ("jraggym.retrieval.milvus_collection", "jraggym.retrieval.encoder"),
    ("jraggym.retrieval.milvus_collection", "jraggym.retrieval.vectors"),
    ("jraggym.models.bert*", "jraggym.models.encoders"),
    ("jraggym.models.encoder_folder", "jraggym.models.encoders"),
    ("jraggym.models.encoder_folder", "jraggym.models.bert"),
    ("jraggym.models.bert_encoder", "jraggym.models.*"),
    ("jraggym.models.*", "jraggym.models.decoder"),
    ("jraggym.models.*", "jraggym.models.likelihood"),
    ("jraggym.models.*", "jraggym.models.linear"),
    ("jraggym.objectives.*", "jraggym.objectives.forward"),
    ("jraggym.objectives.*", "jraggym.objectives.pairs"),
    ("jraggym.objectives.dpo", "jraggym.objectives.sft"),
    ("jraggym.objectives.policy", "jraggym.objectives.kl"),
    ("jraggym.objectives.ppo", "jraggym.objectives.*"),
    ("jraggym.agents", "jraggym.agents.*"),
    ("jraggym.agents.*", "jraggym.text.actions"),
    ("jraggym.agents.*", "jraggym.agents.agent"),
    ("jraggym.agents.*", "jraggym.agents.output"),
    ("jraggym.agents.*", "jraggym.agents.prompts"),
    ("jraggym.agents.search_o1", "jraggym.agents.react"),
    ("jraggym.agents.iter_retgen", "jraggym.agents.rag"),
    ("jraggym.ask", "jraggym.agent_episodes"),
    ("jraggym.ask", "jraggym.scripted"),
    ("jraggym.agent_records", "jraggym.labelling"),
    ("jraggym.agent_records", "jraggym.scripted"),
    ("jraggym.agent_episodes", "jraggym.episodes"),
    ("jraggym.agent_episodes", "jraggym.labelling"),
    ("jraggym.agent_episodes", "jraggym.scripted"),
    ("jraggym.episodes", "jraggym.labelling"),
    ("jraggym.rollout", "jraggym.episodes"),
    ("jraggym.training", "jraggym.checkpoint"),
    ("jraggym.collection", "jraggym.rollout"),
    ("jraggym.gathering", "jraggym.rollout"),
    ("jraggym.experience", "jraggym.steps"),
    ("jraggym.model_folder", "jraggym.checkpoint"),
    ("jraggym.porting.*", "jraggym.porting.pieces"),
    ("jraggym.porting.*", "jraggym.porting.reading"),
    ("jraggym.porting.*", "jraggym.porting.writing"),
    ("jraggym.porting.pretrained", "jraggym.model_folder"),
    ("jraggym.chats.endpoint", "jraggym.chats.connection"),
    ("jraggym.chats.local", "jraggym.model_folder"),
    ("jraggym.chats.critic", "jraggym.model_folder"),
    ("jraggym.chats.critic", "jraggym.chats.local"),
    ("jraggym.chats.opening", "jraggym.chats.local"),
    ("jraggym.chats.opening", "jraggym.chats.critic"),
    ("jraggym.chats.opening", "jraggym.porting.pretrained"),
    ("jraggym.onpolicy", "jraggym.checkpoint"),
    ("jraggym.onpolicy", "jraggym.experience"),
    ("jraggym.onpolicy", "jraggym.gathering"),
    ("jraggym.recorded_gathering", "jraggym.gathering"),
    ("jraggym.recorded_gathering", "jraggym.rollout"),
    ("jraggym.onpolicy", "jraggym.rollout"),
    ("jraggym.onpolicy", "jraggym.steps"),
    ("jraggym.onpolicy", "jraggym.training"),
    ("jraggym.models.*", "jraggym.models.architecture"),
    ("jraggym.models.families", "jraggym.models.config_values"),
    ("jraggym.models.decoder", "jraggym.models.attention"),
    ("jraggym.models.likelihood", "jraggym.models.attention"),
    ("jraggym.launching.*", "jraggym.launching.*"),
    ("jraggym.evidence.episodes", "jraggym.evidence.proposals"),
    ("jraggym.models.bert_critic", "jraggym.models.bert"),
    ("jraggym.models.bert_critic", "jraggym.models.bert_encoder"),
    ("jraggym.sources.*", "jraggym.labelling"),
    ("jraggym.sources.*", "jraggym.sources.table"),
    ("jraggym.sources.outcome", "jraggym.sources.relabel"),
    ("jraggym.sources.*", "jraggym.sources.wording"),
    ("jraggym.sources.rollouts", "jraggym.rollout"),
    ("jraggym.recipes.*", "jraggym.recipes.task"),
    ("jraggym.recipes.*", "jraggym.recipes.settings"),
    ("jraggym.recipes.*", "jraggym.recipes.bench"),
    ("jraggym.recipes.agent_labels", "jraggym.recipes.*"),
    ("jraggym.recipes.agent_collecting", "jraggym.recipes.*"),
    ("jraggym.recipes.rows", "jraggym.recipes.quickstart"),
    ("jraggym.recipes.scaling", "jraggym.recipes.*"),
    ("jraggym.recipes.whole_episodes", "jraggym.recipes.*"),
    ("jraggym.recipes.experiment", "jraggym.recipes.*"),
    ("jraggym.recipes.offline", "jraggym.recipes.*"),
    ("jraggym.recipes.online", "jraggym.recipes.*"),
    ("jraggym.recipes.collecting", "jraggym.recipes.*"),
    ("jraggym.recipes.labelling", "jraggym.recipes.*"),
    ("jraggym.recipes.tags", "jraggym.recipes.*"),
    ("jraggym.recipes.transcripts", "jraggym.recipes.*"),
    ("jraggym.planning.*", "jraggym.planning.topologies"),
    ("jraggym.planning.costs", "jraggym.planning.hlo"),
    ("jraggym.planning.plan", "jraggym.planning.programs"),
    ("configs.llama_70b", "configs.llama_8b"),
    ("configs.*_agents", "configs.critic_agents"),
    ("train.*", "train.results"),
    ("train.*", "train.job"),
    ("train.*", "eval.report"),
    ("eval.learning", "eval.pooled"),
]

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def row(module):
    """The row of a module, or None when no pattern knows it."""
    return next((row for pattern, row in ROWS.items() if fnmatch.fnmatchcase(module, pattern)), None)


def imports(module, tree, modules):
    """The modules of ours that `module` imports, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # no file of ours needs them; an absolute import can be searched for
                raise AssertionError(f"{module}: relative import of {base!r}; write it from the package on")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules else base for name in inner]
            if base == "jraggym":  # the version is a constant of the package; any module may read it
                names = [name for name, alias in zip(names, node.names, strict=True) if alias.name != "__version__"]
        else:
            continue
        yield from (name for name in dict.fromkeys(names) if name.split(".")[0] in PACKAGES)


def layer_faults(module, tree, modules=frozenset(FILES)):
    """What is wrong with the imports of `module`, one sentence each."""
    own = row(module)
    if own is None:
        yield f"{module} has no row: add it to ROWS in {Path(__file__).name}"
        return
    for imported in imports(module, tree, modules):
        theirs = row(imported)
        if theirs is None:
            yield f"{module} imports {imported}, which has no row"
        elif theirs > own:
            yield f"{module} (row {own}) imports {imported} (row {theirs}): imports go down only"
        elif theirs == own and 0 < own < 4 and not built_on(module, imported):
            yield f"{module} imports {imported} of its own row {own}: lower it, or list the pair in SIBLINGS"


def built_on(module, imported):
    return any(fnmatch.fnmatchcase(module, a) and fnmatch.fnmatchcase(imported, b) for a, b in SIBLINGS)


def dotted(node):
    """`os.system` for the expression os.system, "" for what is no plain dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def forbidden_faults(module, tree):
    """Calls that no module may make, and what only entries may do: print and read the command line."""
    for node in ast.walk(tree):
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        if called in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen"):
            yield f"{module}:{node.lineno} calls {called}"
        if isinstance(node, ast.Call) and any(
            keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            for keyword in node.keywords
        ):
            yield f"{module}:{node.lineno} calls {called} with shell="
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "sys"):
            for name in {alias.name for alias in node.names} & {"system", "popen", "argv"}:
                yield f"{module}:{node.lineno} imports {name} from {node.module}: write {node.module}.{name}"
        if row(module) != 4 or module.split(".")[0] == "jraggym":
            if called == "print":
                yield f"{module}:{node.lineno} prints; only train/ and eval/ do"
            if isinstance(node, ast.Attribute) and dotted(node) == "sys.argv":
                yield f"{module}:{node.lineno} reads sys.argv; only train/ and eval/ do"


def length_faults(module, source, tree):
    if (lines := source.count("\n")) > MAX_FILE:
        yield f"{module} has {lines} lines; the limit is {MAX_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield f"{module}.{node.name} has {lines} lines; the limit is {MAX_FUNCTION}"


@pytest.fixture(scope="module")
def trees():
    assert "jraggym.types" in FILES, "the test does not see the package"
    return {module: ast.parse(path.read_text(encoding="utf-8"), str(path)) for module, path in FILES.items()}


def refuse(faults):
    assert not faults, "\n" + "\n".join(faults)


def test_imports_go_down_only(trees):
    refuse([fault for module, tree in trees.items() for fault in layer_faults(module, tree)])


def test_no_circle_of_imports(trees):
    graph = {module: set(imports(module, tree, FILES)) - {module} for module, tree in trees.items()}
    graph["jraggym"] = set()  # its one import waits until `make` is asked for
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_nothing_executes_text_and_only_entries_talk(trees):
    refuse([fault for module, tree in trees.items() for fault in forbidden_faults(module, tree)])


def test_files_and_functions_stay_short(trees):
    sources = {module: FILES[module].read_text(encoding="utf-8") for module in trees}
    refuse([fault for module, tree in trees.items() for fault in length_faults(module, sources[module], tree)])


def test_every_row_and_sibling_pattern_is_about_this_package():
    assert all(pattern.split(".")[0].rstrip("*") in PACKAGES for pattern in ROWS)
    for importer, imported in SIBLINGS:
        assert row(importer) == row(imported), f"{importer} and {imported} are of different rows: no sibling pair"


# ---------------------------------------------------------------- the checks themselves can fail

KNOWN = frozenset(
    {"jraggym.types", "jraggym.text.actions", "jraggym.rollout", "jraggym.retrieval.dense", "jraggym.gym"}
)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        (
            "jraggym.types",
            "from jraggym.text.actions import TAGS",
            "jraggym.types (row 0) imports jraggym.text.actions",
        ),
        ("jraggym.types", "def f():\n    import jraggym.rollout", "imports jraggym.rollout (row 3)"),
        ("jraggym.agents.react", "from jraggym.retrieval import dense", "imports jraggym.retrieval.dense (row 2)"),
        ("jraggym.agents.react", "from jraggym import gym", "imports jraggym.gym (row 3)"),
        ("jraggym.agents.react", "import jraggym", "imports jraggym (row 4)"),
        ("jraggym.agents.react", "from jraggym.data.plan import Plan", "jraggym.data.plan of its own row 1"),
        ("jraggym.rollout", "from train.sft import main", "imports train.sft (row 4)"),
        ("jraggym.surprise", "", "jraggym.surprise has no row"),
        ("jraggym.rollout", "import jraggym.surprise", "imports jraggym.surprise, which has no row"),
    ],
)
def test_a_wrong_import_is_named(module, source, fault):
    assert any(fault in found for found in layer_faults(module, ast.parse(source), KNOWN))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jraggym.metrics", "from jraggym.errors import InputError"),
        ("jraggym.text.rendering", "from jraggym.text.actions import TAGS\nfrom jraggym.types import State"),
        ("jraggym.gym", "def f():\n    from jraggym.retrieval.dense import DenseIndex"),
        ("jraggym.checkpoint", "from jraggym import __version__, types"),
        ("train.sft", "from jraggym.rollout import rollout\nfrom configs.small import CONFIG"),
    ],
)
def test_a_right_import_passes(module, source):
    assert list(layer_faults(module, ast.parse(source), KNOWN)) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("eval(text)", "calls eval"),
        ("def f():\n    exec(text)", "calls exec"),
        ("os.system('ls')", "calls os.system"),
        ("from os import system", "imports system from os"),
        ("subprocess.run('ls', shell=True)", "shell="),
        ("print('x')", "prints"),
        ("import sys\nx = sys.argv[1:]", "reads sys.argv"),
        ("from sys import argv", "imports argv from sys"),
    ],
)
def test_a_forbidden_call_is_named(source, fault):
    assert any(fault in found for found in forbidden_faults("jraggym.rollout", ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["model.eval()", "subprocess.run(['ls'], shell=False)", "re.compile('x')", "'eval(x)'"]
)
def test_what_only_looks_forbidden_passes(source):
    assert list(forbidden_faults("jraggym.rollout", ast.parse(source))) == []


def test_entries_may_talk_but_not_execute():
    assert list(forbidden_faults("train.sft", ast.parse("import sys\nprint(sys.argv)"))) == []
    assert list(forbidden_faults("train.sft", ast.parse("eval(text)")))


def test_long_code_is_named():
    long = "def f():\n" + "    x = 1\n" * MAX_FUNCTION
    assert any("jraggym.a.f has 81 lines" in fault for fault in length_faults("jraggym.a", long, ast.parse(long)))
    short = long.rsplit("    ", 1)[0]
    assert not list(length_faults("jraggym.a", short, ast.parse(short)))
    assert any("301 lines" in fault for fault in length_faults("jraggym.a", "\n" * 301, ast.parse("")))
