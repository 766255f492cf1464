"""Compares the runtime with PEFT on SmolLM2-135M and held-out tables; writes `results.json` and `results.md`.

    python examples/real/evaluate.py --threads 16
    python examples/real/evaluate.py --only peft --device cuda

Every contestant decodes greedily: PEFT in float32, and the runtime on one bundle per precision. The texts of each
contestant and task are kept under `build/real/texts`. A run that was stopped goes on from there, and contestants can
run on different machines. The results are written as soon as all texts are there, and PEFT's texts for the first
tables go to `peft_texts.json`, for the tests.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

# The demo's modules are found because `contestants` adds their folder to the path.
from contestants import BUILDS, LABELS, PEFT, PREFIXES, Subject, engine_of, peft_texts, runtime_texts
from corpus import TASKS, Lighthouse, held_out
from fetch import MODEL
from scoring import score

from prefix_runtime import machine

HERE = Path(__file__).parent
TEXTS = MODEL.parent / "texts"
TABLES_OF_TESTS = 40
"""Tables per task whose texts by PEFT are written for the tests."""


@dataclass(frozen=True)
class Archive:
    """The texts that contestants have written, in a file for each contestant and task."""

    folder: Path
    tables: int
    adapters: Mapping[str, str]
    """SHA-256 of each task's adapter."""
    verify: bool
    """Whether bundles are built with the certificate."""

    def identity(self, name: str, task: str) -> dict[str, Any]:
        """What must be equal for kept texts to be used."""
        built = {} if name == PEFT else {"options": dict(BUILDS[name].options), "verified": self.verify}
        return {"tables": self.tables, "adapter": self.adapters[task], **built}

    def read(self, name: str, task: str) -> dict[str, Any] | None:
        """The kept texts and how they were made; None if there are none with this identity."""
        path = self.folder / name / f"{task}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return kept if kept.get("identity") == self.identity(name, task) else None

    def write(self, name: str, task: str, run: Mapping[str, Any], texts: Sequence[str]) -> None:
        """Keeps texts; the file is there whole or not at all."""
        path = self.folder / name / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        write_json(unfinished, {"identity": self.identity(name, task), "run": run, "texts": texts})
        unfinished.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Evaluation:
    """The subject on held-out tables, and how its contestants run."""

    subject: Subject
    archive: Archive
    lights: Sequence[Lighthouse]
    device: str
    """PEFT's."""
    batch: int

    def run(self, name: str, *, fresh: bool) -> None:
        """Generates and keeps the texts of one contestant, except those that are kept unless `fresh`."""
        tasks = [task for task in self.subject.tasks if fresh or self.archive.read(name, task) is None]
        if not tasks:
            click.echo(f"{LABELS[name]}: all texts are kept", err=True)
        elif name == PEFT:
            self._keep(name, tasks, self._peft_texts)
        else:
            options = BUILDS[name].options
            with engine_of(self.subject, options, verify=self.archive.verify, batch=self.batch) as engine:
                self._keep(name, tasks, lambda task: runtime_texts(engine, task, self.lights))

    def _peft_texts(self, task: str) -> list[str]:
        return peft_texts(self.subject, task, self.lights, device=self.device, batch_size=self.batch)

    def _keep(self, name: str, tasks: Iterable[str], generate: Callable[[str], list[str]]) -> None:
        for task in tasks:
            started = time.perf_counter()
            texts = generate(task)
            self.archive.write(name, task, self._circumstances(name), texts)
            click.echo(f"{LABELS[name]}, {task}: {len(texts)} texts in {time.perf_counter() - started:.0f} s", err=True)

    def _circumstances(self, name: str) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name(self.device) if name == PEFT and self.device != "cpu" else None
        versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}
        return {
            "command": " ".join(["python examples/real/evaluate.py", *sys.argv[1:]]),
            "machine": ", ".join(machine.describe(gpu).values()),
            "versions": machine.versions() | versions,
            "threads": self.subject.threads,
            "batch": self.batch,
        }


def results_of(archive: Archive, names: Sequence[str], lights: Sequence[Lighthouse]) -> dict[str, Any] | None:
    """The scores of all contestants; None if texts are missing, which are listed on standard error."""
    wanted = [(name, task) for name in names for task in archive.adapters]
    kept = {each: content for each in wanted if (content := archive.read(*each)) is not None}
    if missing := [f"{name}/{task}" for name, task in wanted if (name, task) not in kept]:
        click.echo(f"no results yet: texts are missing for {', '.join(missing)}", err=True)
        return None
    found: dict[str, Any] = {}
    for (name, task), content in kept.items():
        peft, texts = kept[PEFT, task]["texts"], content["texts"]
        equal = sum(text == other for text, other in zip(texts, peft, strict=True))
        scores = asdict(score(texts, [TASKS[task](light) for light in lights]))
        scores["equal_to_peft_percent"] = round(100 * equal / len(texts), 1)
        contestant = found.setdefault(name, {"label": LABELS[name], "tasks": {}, "runs": []})
        contestant["tasks"][task] = scores
        contestant["runs"] += [content["run"]] if content["run"] not in contestant["runs"] else []
    return {
        "held_out_tables": archive.tables,
        "decoding": "greedy",
        "built_with_certificate": archive.verify,
        "adapters": dict(archive.adapters),
        "contestants": found,
    }


def peft_texts_for_tests(archive: Archive) -> dict[str, Any]:
    """PEFT's texts for the first tables by task, with the adapters' SHA-256."""
    kept = {task: archive.read(PEFT, task) for task in archive.adapters}
    texts = {task: content["texts"][:TABLES_OF_TESTS] for task, content in kept.items() if content is not None}
    return {"adapters": dict(archive.adapters), "texts": texts}


def as_markdown(results: Mapping[str, Any]) -> str:
    """The scores as a Markdown table: a row for each task and contestant."""
    lines = [
        f"{results['held_out_tables']} held-out tables per task, {results['decoding']} decoding.",
        "",
        "| task | contestant | exact match, % | BLEU | texts equal to PEFT's, % |",
        "|---|---|---|---|---|",
    ]
    for task in results["adapters"]:
        for contestant in results["contestants"].values():
            scores = contestant["tasks"][task]
            figures = (scores[key] for key in ("exact_match_percent", "bleu", "equal_to_peft_percent"))
            lines.append(f"| {task} | {contestant['label']} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    return "\n".join(lines) + "\n"


def adapter_hash(folder: Path) -> str:
    """SHA-256 of an adapter's weights in hexadecimal.

    Raises:
        click.ClickException: the folder holds no adapter.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise click.ClickException(f"expected an adapter, found no file {weights}; run train_prefixes.py first")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def names_in(listed: str, known: Iterable[str], option: str) -> list[str]:
    """The names in a comma-separated list, in the order of `known`.

    Raises:
        click.BadParameter: a name is not known.
    """
    wanted, known = listed.split(","), list(known)
    if unknown := sorted(set(wanted) - set(known)):
        raise click.BadParameter(f"expected some of {', '.join(known)}, found {', '.join(unknown)}", param_hint=option)
    return [name for name in known if name in wanted]


@click.command()
@click.option("--tables", default=400, show_default=True, help="Number of held-out tables per task.")
@click.option("--tasks", default=",".join(TASKS), show_default=True, help="Tasks, with commas between them.")
@click.option("--precisions", default=",".join(BUILDS), show_default=True, help="Bundles, with commas between them.")
@click.option("--only", help="Contestants that run now, of peft and the precisions. Default: all.")
@click.option("--fresh", is_flag=True, help="Generate again even if texts are kept.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Build with the certificate.")
@click.option("--threads", type=int, help="CPU threads. Default: torch and onnxruntime decide.")
@click.option("--batch", default=16, show_default=True, help="Prompts that run together.")
@click.option("--device", default="cpu", show_default=True, help="PEFT's torch device.")
@click.option("--base", type=click.Path(path_type=Path, exists=True), default=MODEL, help="Base model's folder.")
@click.option("--prefixes", type=click.Path(path_type=Path, exists=True), default=PREFIXES, help="Adapters' folder.")
@click.option("--texts", type=click.Path(path_type=Path), default=TEXTS, help="Folder that keeps the texts.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE, help="Folder for the results.")
def main(tables: int, precisions: str, only: str | None, *, fresh: bool, output: Path, **options: Any) -> None:
    """Compare the runtime with PEFT on held-out tables."""
    names = [PEFT, *names_in(precisions, BUILDS, "--precisions")]
    tasks = names_in(options["tasks"], TASKS, "--tasks")
    subject = Subject(options["base"], options["prefixes"], tasks, options["threads"])
    adapters = {task: adapter_hash(folder) for task, folder in subject.adapters().items()}
    archive = Archive(options["texts"], tables, adapters, options["verify"])
    evaluation = Evaluation(subject, archive, held_out(tables), options["device"], options["batch"])
    if subject.threads:
        torch.set_num_threads(subject.threads)
    for name in names if only is None else names_in(only, names, "--only"):
        evaluation.run(name, fresh=fresh)
    results = results_of(archive, names, evaluation.lights)
    if results is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "results.json", results)
        write_json(output / "peft_texts.json", peft_texts_for_tests(archive))
        table = as_markdown(results)
        (output / "results.md").write_text(table, encoding="utf-8")
        click.echo(table, nl=False)


if __name__ == "__main__":
    main()
