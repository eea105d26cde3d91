"""What a changed key means for a run that resumes: every key of the schema has its place here.

The comparison is of plain values, so that what a checkpoint holds can be told although a class of
the user's that it names is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from attnres_train.config.fields import inner_section
from attnres_train.config.schema import RunConfig
from attnres_train.config.section import Section
from attnres_train.config.yaml_text import KeyPath, dotted, flow


class Effect(StrEnum):
    """What another value does to a run between two of its steps."""

    MODEL = "model"
    """The weights mean something else: refused."""
    DATA = "data"
    """The position in the data means something else: refused."""
    TOKENIZER = "tokenizer"
    """Token ids mean something else: refused."""
    RECIPE = "recipe"
    """The run goes on in another way: allowed, told and kept."""
    STAGE = "stage"
    """As the key outside of `stages` while the stage is under way (`attnres_train.runs.stages`)."""
    NONE = "without effect"
    """Nothing that is learnt changes, but for rounding: not told. What a file holds is compared by
    its content, wherever it lies."""


REFUSED = (Effect.MODEL, Effect.DATA, Effect.TOKENIZER)
TOLD = (*REFUSED, Effect.RECIPE)

_TABLE: dict[Effect, dict[str, str]] = {
    Effect.MODEL: {
        "model": "hidden_size num_layers vocab_size intermediate_size full_attention_interval "
        "full_attention_layers norm_eps",
        "model.residual": "kind block_size norm_eps window query scores normalizer key_norm "
        "num_heads values block_sum norm_gate_rank num_streams options",
        "model.kda": "num_heads head_dim short_conv_kernel_size gate gate_lower_bound",
        "model.mla": "num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "kv_norm_eps",
        "model.moe": "num_experts num_experts_per_token num_shared_experts intermediate_size "
        "routed_scaling_factor first_dense_layers",
    },
    Effect.DATA: {
        "run": "seed",
        "train": "seq_length",
        "data.corpus": "kind weight text_field options",
        "data": "split",
    },
    Effect.TOKENIZER: {"data.tokenizer": "kind vocab_size eod pattern special_tokens options"},
    Effect.RECIPE: {
        "model.moe": "bias_update_rate",
        "train": "train_iters global_batch_size precision clip_grad eval_interval eval_iters "
        "spike_window spike_deviations on_spike",
        "optimizer": "kind lr weight_decay betas eps momentum ns_steps ns_dtype per_head "
        "adamw_matrices qk_clip options",
        "lr_schedule": "kind warmup_iters decay_end_iter wsd_decay_iters min_lr_ratio options",
        "data": "reset_at_documents mask_document_ends",
    },
    Effect.STAGE: {
        "stages": "name",
        "stages.train": "train_iters seq_length micro_batch_size global_batch_size recompute "
        "eval_interval eval_iters",
        "stages.optimizer": "lr weight_decay",
        "stages.lr_schedule": "kind warmup_iters decay_end_iter wsd_decay_iters min_lr_ratio "
        "options",
        "stages.data.corpus": "kind path weight text_field options",
        "stages.data": "split reset_at_documents mask_document_ends",
        "stages.model.moe": "bias_update_rate",
    },
    Effect.NONE: {
        "run": "name dir start_timeout_seconds",
        "model": "initializer_range",
        "model.residual": "two_phase",
        "model.kda": "chunk_size",
        "parallel": "pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "tensor_model_parallel_size expert_model_parallel_size expert_dispatcher "
        "expert_capacity_factor context_parallel_size layout",
        "pipeline": "schedule schedule_options debug timeout_seconds",
        "train": "micro_batch_size stop_after recompute max_skipped_steps max_roll_backs device "
        "backend",
        "optimizer": "sharded",
        "data.corpus": "path",
        "data.tokenizer": "path",
        "data": "new cache_dir verify",
        "checkpoint": "save_interval keep_last keep_every async_save timeout_seconds "
        "drift_interval on_damage resume load reset allow",
        "log": "interval progress tensorboard plot",
        "log.wandb": "enabled project mode",
        "log.samples": "interval prompts max_new_tokens temperature",
        "log.observers": "kind options",
        "observe": "interval keep",
        "observe.profile": "steps ranks",
    },
}
EFFECTS: dict[str, Effect] = {
    f"{section}.{name}": effect
    for effect, sections in _TABLE.items()
    for section, names in sections.items()
    for name in names.split()
}
"""By key, list elements without their index."""

_SAME: dict[str, tuple[Any, Any]] = {"data.tokenizer.pattern": (None, "gpt2")}
"""By key, two values that mean the same."""


@dataclass(frozen=True)
class Change:
    """A value that is not what it was."""

    key: str
    before: Any
    after: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.before)} -> {_shown(self.after)}"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every key that has another value ``after`` than ``before``, those without effect too. Both
    are plain values of a configuration (`config.saved.saved_values`); a missing key has its
    default."""
    old, new = (dict(_values(RunConfig, values, ())) for values in (before, after))
    return [
        Change(dotted(path), old.get(path), new.get(path), effect_of(path))
        for path in dict.fromkeys([*new, *old])
        if not _same(path, old.get(path), new.get(path))
    ]


def _same(path: KeyPath, old: Any, new: Any) -> bool:
    alike = _SAME.get(dotted(path), ())
    return old == new or (old in alike and new in alike)


def effect_of(path: KeyPath) -> Effect:
    """Of the key at ``path``; one that nobody has placed counts as the model's."""
    key = dotted(tuple(step for step in path if isinstance(step, str)))
    return EFFECTS.get(key, Effect.MODEL)


def _values(section: type[Section], given: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every key of ``section`` below ``path`` with its value in ``given``, or its default."""
    given = given if isinstance(given, Mapping) else {}
    for name, field in section.model_fields.items():
        value = given[name] if name in given else _default(field)
        inner, here = inner_section(field.annotation), (*path, name)
        if inner is None or not inner.model_fields:
            yield here, value
        elif get_origin(field.annotation) is list:
            for index, item in enumerate(value or []):
                yield from _values(inner, item, (*here, index))
        else:
            yield from _values(inner, value, here)


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _shown(value: Any) -> str:
    text = "nothing" if value is None else flow(value)
    return text if len(text) <= 60 else text[:57] + "..."
