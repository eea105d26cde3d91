"""What corpora are called in the records of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from attnres_train.config.data_schema import CorpusConfig


def corpus_labels(corpora: Sequence[CorpusConfig]) -> list[str]:
    """A short name of each of ``corpora``: that of its (first) file or folder without endings, for
    a glob that of the folder, else its kind. Of several that would be called the same each has its
    number, from 0, behind it: ``wiki.1``. No two are equal, and none has a slash."""
    names = [_label(corpus) for corpus in corpora]
    count = Counter(names)
    labels = [f"{name}.{i}" if count[name] > 1 else name for i, name in enumerate(names)]
    if len({*labels}) < len(labels):  # one is called as another with its number
        labels = [f"{name}.{i}" for i, name in enumerate(names)]
    return labels


def _label(corpus: CorpusConfig) -> str:
    path = corpus.path if isinstance(corpus.path, str) else next(iter(corpus.path or ()), "")
    parts = [part for part in PurePath(path).parts if not set(part) & set("*?[/")]
    name = parts[-1] if parts else ""
    # A leading dot is none of an ending.
    return name[:1] + name[1:].partition(".")[0] or corpus.kind
