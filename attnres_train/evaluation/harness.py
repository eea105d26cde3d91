"""A model of ours for EleutherAI's lm-evaluation-harness, which is imported here: whoever imports
this module needs lm-eval, and has ``attnres`` among the names of its models.

    lm_eval.simple_evaluate(model="attnres", model_args="path=runs/mine", tasks=[...])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.decoding import CachedDecoder, Reader, generate
from attnres_train.inference.joining import join_model
from attnres_train.inference.opening import Saved, find_saved, open_model
from attnres_train.inference.sampling import Sampling
from attnres_train.parallel.launched import launched_world_size

MOST_NEW_TOKENS = 256
"""Of a task that says no number, as the harness has it."""


@register_model("attnres")
class HarnessModel(TemplateLM):
    """The model in ``path``, a run or step folder, in one process or over several
    (`over_processes`). To the harness there is one, which gets all requests.

    Texts are encoded as in training: a special token's name in them is text, and the token that
    ends documents stands in front where there is nothing else. Of what is longer than
    ``max_length`` (default: `train.seq_length`) the beginning is left out.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        reader: Reader | None = None,
        **others: Any,
    ) -> None:
        """``reader`` is the model where it is open already, ``others`` are what the harness passes
        to every model. Raises UserError where the run has no tokenizer, as one of several processes
        that would do the same, and as `open_model`."""
        super().__init__()
        saved = find_saved(path)
        self.encoder = text_tokenizer(saved)
        if reader is None:
            if (count := launched_world_size()) and count > 1:
                raise UserError(
                    f"{count} processes were started, of which each would open the whole model and "
                    "do the same: share it by attnres-train harness, or by "
                    "attnres_train.evaluation.harness.over_processes"
                )
            reader = CachedDecoder.of(open_model(saved.path, device or "auto").chunk)
        self.reader = reader
        self.max_length = int(max_length or saved.config.train.seq_length)
        known = batch_size is not None and str(batch_size).isdigit()
        self.batch_size = int(batch_size) if known else 8  # type: ignore[arg-type]  # a number

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eod

    @property
    def tokenizer_name(self) -> str:
        return self.encoder.digest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        return self.encoder.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """Of each (key, context, continuation): the log-likelihood of the continuation, nats, and
        whether greedy decoding gives it."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda n: -sum(map(len, requests[n][1:])))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            scored = self._scored([requests[number][1:] for number in numbers])
            for number, score in zip(numbers, scored, strict=True):
                found[number] = score
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
        return found

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        rows = [self._kept(context, continuation) for context, continuation in pairs]
        losses = self.reader.score(rows)
        for place, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            own = slice(len(row) - 1 - len(continuation), len(row) - 1)
            nats = losses.nats[place, own].double().sum().item()
            yield -nats, bool(losses.is_best[place, own].all())

    def _kept(self, context: list[int], continuation: list[int]) -> list[int]:
        """The last ``max_length`` + 1 tokens of both, of which the last is predicted alone."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than max_length, "
                f"{self.max_length}: raise it"
            )
        return (context + continuation)[-(self.max_length + 1) :]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token once, in windows of ``max_length``."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.encoder.encode(text),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of the task's ``until``, the end of the document, or its
        ``max_gen_toks``: greedy, but where the task gives a temperature."""
        found = []
        for context, settings in (request.args for request in requests):
            until = settings.get("until") or []
            text = self._continued(
                context,
                [until] if isinstance(until, str) else list(until),
                int(settings.get("max_gen_toks", MOST_NEW_TOKENS)),
                _sampling(settings),
            )
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            found.append(text)
        return found

    def _continued(self, context: str, until: list[str], most: int, sampling: Sampling) -> str:
        given = self.encoder.encode(context) or [self.eot_token_id]
        prompt = given[-max(1, self.max_length - most) :]
        end = self.eot_token_id
        ids: list[int] = []
        for _, token in generate(
            self.reader, [prompt], sampling, most, end, vocab_size=self.encoder.vocab_size
        ):
            if token == end:
                break
            ids.append(token)
            text = self.encoder.decode(ids)
            places = [text.find(stop) for stop in until if stop and stop in text]
            if places:
                return text[: min(places)]
        return self.encoder.decode(ids)


def text_tokenizer(saved: Saved) -> Tokenizer:
    """Of a run that was trained on text. Raises UserError for others."""
    tokenizer = saved.tokenizer()
    if tokenizer is None:
        raise UserError(f"{saved.path} has no tokenizer (data.tokenizer.kind none): tasks are text")
    return tokenizer


@contextmanager
def over_processes(
    path: str, overrides: Sequence[str] = (), device: str = "auto", **settings: Any
) -> Iterator[HarnessModel | None]:
    """The model in ``path`` over the processes of a launcher (torchrun), on the grid of
    ``overrides``, keys of `parallel` (none: the run's own). Rank 0 gets the model, with
    ``settings`` as of `HarnessModel`; all others get None, once rank 0 is done with it. Raises
    UserError as `join_model`. Collective."""
    patience = timedelta(days=7)  # until the data of a task has come
    with join_model(path, overrides, device, _looked_at, patience=patience) as joined:
        if joined is None:
            yield None
        else:
            step_folder, reader = joined
            yield HarnessModel(step_folder, reader=reader, **settings)


def _looked_at(saved: Saved) -> str:
    text_tokenizer(saved)
    return str(saved.path)


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Of a task: it samples if it says so by ``do_sample``, or by a temperature alone."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        temperature = 0.0
    elif not temperature:
        temperature = 1.0
    return Sampling(temperature, float(settings.get("top_p", 1.0)), settings.get("top_k"))
