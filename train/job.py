"""What the entries share: the job's folder, the world and its indexes, metrics for TensorBoard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro

from jraggym.chats.opening import settings_of
from jraggym.errors import InputError, exit_on_input_error
from jraggym.hosts import connect, lead, lead_first
from jraggym.model_folder import Model, save_model
from jraggym.models.architecture import RUNTIME
from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.porting.pretrained import open_model
from jraggym.preemption import preemptible
from jraggym.recipes.bench import Bench
from jraggym.recipes.quickstart import Workshop, train_tokenizer
from jraggym.recipes.settings import Settings
from jraggym.recipes.task import Split, Task, hotpotqa_task, synthhop_task
from jraggym.retrieval.encoder import TfidfEncoder
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.retrieval.vectors import stored_vectors
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.whole import write_whole
from train.results import Console

write = write_whole
Progress = Callable[[str, int, int, Any], None]
LEAST_SECONDS = 0.5  # programs that compile faster are not kept


def claim(out: Path, job: Mapping[str, Any]) -> None:
    """Makes sure that `out` is new or belongs to the same job (JSON values); keeps compiled programs there."""
    logging.disable(logging.INFO)
    plain = json.loads(json.dumps(job, default=str))
    path = out / "job.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if (found := json.loads(path.read_text())) != plain:
                differing = ", ".join(sorted(_differences(found, plain))[:5])
                got = f"{path} differs in {differing}"
                raise InputError(f"{out} holds a job of other settings", got=got, remedy="Name another --out folder.")
        else:
            write(path, json.dumps(plain, indent=1))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot use {out}", got=error, remedy="Name another --out folder.") from error
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str((out / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    # XLA's own caches (of GPU kernels) would make the folder's path a part of every program's key, and a folder that is
    # copied or moved would be compiled anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _differences(left: Any, right: Any, name: str = "") -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        names = left.keys() | right.keys()
        return [d for n in names for d in _differences(left.get(n), right.get(n), f"{name}.{n}" if name else n)]
    return [] if left == right else [name]


def prepare(
    settings: Settings,
    dataset: str,
    data_dir: Path | None,
    out: Path,
    progress: Progress,
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer | None = None,
    development: bool = False,
    make_tokenizer: Callable[[Task, Settings], SentencePieceTokenizer] = train_tokenizer,
) -> Workshop:
    """The world, its indexes and the tokenizer (made when none is given).

    The development split's index is made where it is asked for.
    """
    sizes = {
        "train": settings.demonstrations + 2 * settings.collected,
        "development": settings.development,
        "test": settings.test,
    }
    if dataset == "synthhop":
        task = synthhop_task(settings.seed, **sizes, hops=settings.hops)
    elif dataset != "hotpotqa":
        raise InputError("unknown dataset", got=repr(dataset), remedy="Use one of synthhop, hotpotqa.")
    elif data_dir is None:
        raise InputError("hotpotqa needs its files", got="no --data-dir", remedy="Add --data-dir FOLDER.")
    else:
        task = hotpotqa_task(data_dir, **sizes)
    train, test = (_retriever(split, task, settings, progress, out) for split in (task.train, task.test))
    held = _retriever(task.development, task, settings, progress, out) if development else None
    if tokenizer is None:
        tokenizer = make_tokenizer(task, settings)
        if lead():
            write(out / "tokenizer.model", tokenizer.model)
        model = dataclasses.replace(settings.model, vocab=tokenizer.vocab_size)
        settings = dataclasses.replace(settings, model=model)
    return Workshop(settings, tokenizer, out, progress, task, train, test, held)


def _retriever(split: Split, task: Task, settings: Settings, progress: Progress, out: Path) -> HybridRetriever:
    if task.name == "synthhop":
        encoder = TfidfEncoder.fit(split.corpus.texts(), dim=settings.vector)
        return HybridRetriever(split.corpus, encoder, k=settings.documents)
    real = BertEncoder.load(minilm_path())
    told = partial(_report, progress, "embed", len(split.corpus))
    vectors = lead_first(lambda: stored_vectors(out, real.document, split.corpus.documents, progress=told))
    return HybridRetriever(split.corpus, real, k=settings.documents, vectors=vectors)


def _report(progress: Progress, name: str, total: int, done: int) -> None:
    progress(name, done, total, None)


class Logbook:
    """Metrics as TensorBoard event files in `out`/tensorboard, and to Weights & Biases when a project is named.

    A job that goes on tells all its steps again (history.py): its first value takes the place of all that was written
    before. Values are read from the device some steps later, so that writing them never makes it wait.
    """

    def __init__(self, out: Path, job: Any, wandb_project: str | None = None, lag: int = 2):
        self._folder = out / "tensorboard"
        self._writer: Any = None
        self._waiting: list[tuple[str, int, Mapping[str, Any]]] = []
        self._lag, self._wandb = lag, None
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise InputError("wandb is not installed", got=error, remedy="pip install wandb") from error
            about = {"project": wandb_project, "dir": str(out), "config": dataclasses.asdict(job)}
            name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(id=name, resume="allow", **about)

    def write(self, group: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step and writes those of some steps ago."""
        self._waiting.append((group, step, dict(metrics)))
        while len(self._waiting) > self._lag:
            self._put(*self._waiting.pop(0))

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
            # A page that is open has read the old files: this tells it to forget them.
            self._writer = SummaryWriter(str(self._folder), purge_step=0)
        return self._writer

    def close(self) -> None:
        """Writes what is left."""
        for waiting in self._waiting:
            self._put(*waiting)
        self._waiting = []
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _put(self, group: str, step: int, metrics: Mapping[str, Any]) -> None:
        values = {f"{group}/{name}": float(value) for name, value in metrics.items()}
        writer = self._open()
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if self._wandb is not None and step >= self._wandb.step:  # it has what came before, and takes no step twice
            self._wandb.log(values, step=step)


def entry(experiments: Mapping[str, tuple[str, Any]], work: Callable) -> None:
    """The whole of an entry: one of its experiments, overridden from the command line, from start to model.

    `work` gets (experiment, shop, starting model or None, log) and returns the model and its results.
    """
    with exit_on_input_error():
        run_experiment(tyro.extras.overridable_config_cli({**experiments}), work)


def run_experiment(experiment: Any, work: Callable) -> dict[str, Any]:
    """Runs one experiment, and writes `out`/model and `out`/results.json; of several processes the first one writes."""
    with connect(experiment.hosts), preemptible():
        return _run(experiment, work)


def _run(experiment: Any, work: Callable) -> dict[str, Any]:
    console, out, kind = Console(), experiment.out, type(experiment).__name__
    # First, so that a wrong name of a model does not claim the folder.
    start = None if experiment.model is None else open_model(experiment.model, "actor", experiment.devices.mesh())
    lead_first(lambda: claim(out, {"kind": kind, **plain(experiment)}))
    settings, book = experiment.seeded(), Logbook(out, experiment, experiment.wandb) if lead() else None
    if start is not None:
        running = {name: getattr(settings.model, name) for name in RUNTIME}
        settings = dataclasses.replace(settings, model=dataclasses.replace(start.config, **running))
    shop: Bench
    if start is not None and experiment.worldless:
        shop = Bench(settings, start.tokenizer, out, console.progress)
    else:
        with console.stage("world, indexes and tokenizer", experiment.dataset):
            shop = prepare(
                settings,
                experiment.dataset,
                experiment.data_dir,
                out,
                console.progress,
                start.tokenizer if start else None,
                development=experiment.evaluate == "development",
                make_tokenizer=experiment.tokenizer,
            )
    with closing(book) if book else nullcontext(), console.stage(kind.lower()):
        model, results = work(experiment, shop, start, book.write if book else _unwritten)
    if model is not None:
        save_model(out / "model", dataclasses.replace(model, about={**_provenance(experiment, start), **model.about}))
    results = {"experiment": experiment.title, "seed": experiment.seed, "stages": console.stages, **results}
    if not lead():
        return results
    write(out / "results.json", json.dumps(results, indent=1))
    shown = {key: value for key, value in results.items() if key not in ("stages", "curve", "each")}
    print(json.dumps(shown, indent=1))
    print(f"{out}/results.json" + (f" and {out}/model" if model is not None else ""))
    return results


def _unwritten(group: str, step: int, metrics: Mapping[str, Any]) -> None:
    """The log of a process that writes none."""


def _provenance(experiment: Any, start: Model | None) -> dict[str, Any]:
    """What a model's card says of its making, and what an imported model's own configuration said of its use."""
    found = {"made by": type(experiment).__name__, "dataset": experiment.dataset, "seed": experiment.seed}
    if start is not None:
        found["base"] = start.about.get("source", str(experiment.model))
        found |= {key: start.about[key] for key in ("config",) if key in start.about}
    return found


NOT_DECIDING = ("out", "wandb", "every", "hosts", "devices", "rollout_devices", "vectors")


def plain(experiment: Any) -> dict[str, Any]:
    """The fields that decide the result, up to rounding: a job may go on on other devices."""
    found = dataclasses.asdict(experiment)
    if hasattr(experiment, "how"):
        found["how"]["judge"] = settings_of(experiment.how.judge)
        del found["how"]["actor"]
        if experiment.rewards == "rollouts":
            found["how"]["actor"] = settings_of(experiment.how.actor)
    return {key: value for key, value in found.items() if key not in NOT_DECIDING}
