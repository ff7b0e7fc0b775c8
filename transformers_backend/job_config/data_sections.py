"""What a job's TOML file says about data: the keys of one data set, weighted sources of several, and stages.

`[training]` and `[validation]` in `sections.py` build on these, in the manner described there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers_backend.job_config.rules import empty_strings


@dataclass
class TextSource:
    """The keys that name a text data set, shared by `[training]`, `[[training.sources]]` and `[validation]`."""

    dataset: str = "python_stdlib"
    """The text: "python_stdlib" (the Python standard library's own source, no download), a hub id, "c4" for
    "allenai/c4" in English, a path (the same as dataset_path), or a function of yours that returns the data,
    "my_module:function" or "file.py:function" (docs/data_formats.md)."""

    dataset_path: str | None = None
    """Local text file, folder of them, or folder of tokens that scripts/tokenize_corpus.py wrote, read in place of
    dataset. none means dataset is used."""

    dataset_name: str | None = None
    """Name of the data set's configuration on the hub, e.g. "wikitext-103-raw-v1". none means its only one."""

    dataset_split: str = "train"
    """Split of the data set."""

    dataset_revision: str | None = None
    """Branch, tag or commit of the data set's hub repository. none means its main branch."""

    text_column: str = "text"
    """Column of the data set that holds the text. A data set without it that has input_ids is taken as tokenized."""

    messages_column: str | None = None
    """Column with conversations, e.g. "messages": the loss is on the assistant's turns only. none means text."""

    chat_template: str | None = None
    """File with a jinja chat template that is used in place of the tokenizer's. none means the tokenizer's own."""

    def text_problems(self, section: str) -> list[str]:
        named = () if self.dataset is None else ("dataset",)  # None in [validation] alone
        found = empty_strings(section, self, *named, "dataset_split", "text_column")
        if self.dataset_path is not None and not Path(self.dataset_path).expanduser().exists():
            found.append(
                f'{section}.dataset_path = "{self.dataset_path}": no such file or folder from {Path.cwd()}; correct '
                f"the path, or leave it out to read {section}.dataset."
            )
        if self.chat_template is not None and self.messages_column is None:
            found.append(
                f'{section}.chat_template = "{self.chat_template}": has a meaning only for conversations; set '
                f'{section}.messages_column to their column, e.g. "messages", or leave it out.'
            )
        if self.chat_template is not None and not Path(self.chat_template).expanduser().is_file():
            found.append(
                f'{section}.chat_template = "{self.chat_template}": no such file from {Path.cwd()}; correct it.'
            )
        return found


@dataclass
class Source(TextSource):
    """One of several weighted sources, [[training.sources]]."""

    name: str = ""
    """Name of the source, by which stages, messages and checkpoints know it."""

    weight: float = 1.0
    """Share of the training tokens, relative to the other sources' weights."""


@dataclass
class Stage:
    """A part of the run with a mixture of its own, [[training.stages]]."""

    from_step: int = 1
    """First step of the stage; the first stage begins at step 1."""

    sources: list[str] = field(default_factory=list)
    """Names of the sources that are read in this stage. An empty list means all."""

    weights: list[float] = field(default_factory=list)
    """Their weights in this stage, in the order of sources. An empty list means the weights of the sources."""


def held_out_problems(section: str, held_out: TextSource, training: Sequence[TextSource]) -> list[str]:
    """Where no held-out text is named it is the built-in one, whose loss says little of a training on other text."""
    if held_out.dataset is not None or held_out.dataset_path is not None:
        return []
    built_in = TextSource.dataset
    if any(source.dataset_path is None and source.dataset == built_in for source in training):
        return []
    return [
        f"{section}.dataset is missing: without it held-out text is that of {built_in}, and training reads other text; "
        f"set {section}.dataset_path, or {section}.dataset with a split that is there (dataset_split = "
        f'"{held_out.dataset_split}").'
    ]


def mixture_problems(section: str, sources: list[Source], stages: list[Stage], has_dataset: str | None) -> list[str]:
    """Rules of sources and stages; `has_dataset` is the key that names a single data set beside them, if any."""
    found = []
    names = [source.name for source in sources]
    if sources and has_dataset:
        found.append(
            f"{section}.{has_dataset} is set beside {section}.sources: they exclude each other. Move it into an entry "
            f"of [[{section}.sources]], or remove the entries."
        )
    for index, source in enumerate(sources):
        key = f"{section}.sources[{index}]"
        found += empty_strings(key, source, "name") + source.text_problems(key)
        if not source.weight > 0:
            found.append(f"{key}.weight = {source.weight}: must be above 0; remove a source that shall not be read.")
    found += [
        f'{section}.sources: {count} have the name "{name}": names must differ; change one.'
        for name, count in Counter(names).items()
        if count > 1 and name
    ]
    if stages and not sources:
        found.append(f"{section}.stages: choose among sources, and there are none; add [[{section}.sources]].")
        return found
    for index, stage in enumerate(stages):
        found += _stage_problems(f"{section}.stages[{index}]", stage, names)
        least = stages[index - 1].from_step + 1 if index else 1
        if (index and stage.from_step < least) or (not index and stage.from_step != 1):
            rule = f"must be at least {least}, after the stage before it" if index else "the first stage begins at 1"
            found.append(f"{section}.stages[{index}].from_step = {stage.from_step}: {rule}; correct or reorder it.")
    return found


def _stage_problems(key: str, stage: Stage, names: list[str]) -> list[str]:
    found = [
        f'{key}.sources: "{name}" is no source; there are {", ".join(names)}. Correct it or add the source.'
        for name in stage.sources
        if name not in names
    ]
    if len(set(stage.sources)) < len(stage.sources):
        found.append(f"{key}.sources = {stage.sources}: names a source twice; remove one.")
    wanted = len(stage.sources or names)
    if stage.weights and len(stage.weights) != wanted:
        found.append(
            f"{key}.weights = {stage.weights}: must have one weight for each of the stage's {wanted} sources; add or "
            "remove some."
        )
    if any(not weight > 0 for weight in stage.weights):
        found.append(f"{key}.weights = {stage.weights}: must all be above 0; leave out a source that is not read.")
    return found


def stage_weights(sources: list[Source], stages: list[Stage]) -> list[tuple[int, tuple[float, ...]]]:
    """Return (first step, weight of every source) of each stage; a source that is not read has weight 0."""
    own = {source.name: source.weight for source in sources}
    resolved = []
    for stage in stages or [Stage()]:
        names = stage.sources or list(own)
        weights = dict(zip(names, stage.weights or [own[name] for name in names], strict=True))
        resolved.append((stage.from_step, tuple(weights.get(name, 0.0) for name in own)))
    return resolved
