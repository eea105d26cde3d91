from __future__ import annotations

import pytest

from attnres_train.config.checks import data_parallel_size
from tests.config.helpers import says


def test_nothing_wrong(problems):
    assert problems() == []
    assert problems("parallel.layout=[4]", "model.full_attention_layers=[1, 4]", world_size=2) == []


class TestContext:
    def test_lengths_that_do_not_divide(self, problems):
        found = problems("parallel.context_parallel_size=3", "train.seq_length=64")
        says(found, "train.seq_length 64", "2 x 3 = 6 equal shares", "leaves 4 over", "60 or 66")
        found = problems("parallel.context_parallel_size=3", "train.seq_length=19")
        says(found, "19 / 6 leaves 1 over: take 18 or 24")
        assert problems("parallel.context_parallel_size=3", "train.seq_length=18") == []

    def test_shares_shorter_than_a_convolution_reaches(self, problems):
        found = problems("parallel.context_parallel_size=4", "train.seq_length=16")
        says(found, "train.seq_length 16", "2 x 4 = 8 shares", "- 1 = 3 tokens: take 24 or more")

    def test_processes_are_counted(self, problems):
        found = problems("parallel.context_parallel_size=2", world_size=3)
        says(found, "takes 2 (parallel.context_parallel_size 2)", "start 2 or 4 processes")


def test_what_is_kept_for_good_has_to_be_saved(problems):
    found = problems("checkpoint.keep_every=15", "checkpoint.save_interval=10")
    says(found, "checkpoint.keep_every is 15", "checkpoint.save_interval, 10")
    says(problems("checkpoint.keep_every=15"), "checkpoint.keep_every is 15")
    assert problems("checkpoint.keep_every=30", "checkpoint.save_interval=10") == []


class TestModel:
    def test_fewer_experts_than_a_token_uses(self, problems):
        found = problems("model.moe.num_experts=4")
        says(found, "model.moe.num_experts_per_token is 8", "model.moe.num_experts is 4")
        assert problems("model.moe.num_experts=8") == []

    def test_more_dense_layers_than_layers(self, problems):
        says(problems("model.moe.first_dense_layers=5"), "first_dense_layers is 5", "layers is 4")
        assert problems("model.moe.first_dense_layers=4") == []

    @pytest.mark.parametrize(("layers", "named"), [("[0, 1]", "[0]"), ("[4, 5, 9]", "[5, 9]")])
    def test_full_attention_outside(self, problems, layers, named):
        found = problems(f"model.full_attention_layers={layers}")
        says(found, f"model.full_attention_layers names {named}", "model.num_layers = 4")

    def test_full_attention_twice(self, problems):
        says(problems("model.full_attention_layers=[3, 1, 3]"), "names [3] more than once")

    @pytest.mark.parametrize("kind", ["standard", "dense_former", "mhc_lite"])
    def test_options_of_depth_attention_without_it(self, problems, kind):
        found = problems(f"model.residual.kind={kind}", "model.residual.window=8")
        says(found, f"model.residual.window is 8, but model.residual.kind {kind} has no attention")

    @pytest.mark.parametrize("option", ["query=input", "key_norm=false", "values=key"])
    def test_keys_and_queries_with_learned_scores(self, problems, option):
        found = problems("model.residual.scores=bias", f"model.residual.{option}")
        name, value = option.split("=")
        says(found, f"model.residual.{name} is {value}", "scores bias", "neither queries nor keys")

    def test_keys_as_values_that_are_the_sources(self, problems):
        found = problems("model.residual.values=key", "model.residual.key_norm=false")
        says(found, "model.residual.values is key", "key_norm false", "remove one of the two")

    def test_heads_that_do_not_divide_the_channels(self, problems):
        says(problems("model.residual.num_heads=6"), "num_heads is 6", "model.hidden_size 64")

    def test_every_option_of_depth_attention(self, problems):
        options = ("window=3", "query=input", "normalizer=sigmoid", "key_norm=false", "num_heads=4")
        assert problems(*(f"model.residual.{option}" for option in options)) == []

    def test_tokenizer_larger_than_the_embedding(self, problems):
        says(
            problems("data.tokenizer.vocab_size=4097"),
            "data.tokenizer.vocab_size is 4097",
            "raise model.vocab_size to at least 4097",
        )


class TestLayout:
    SPLIT = (
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    )

    def test_more_chunks_than_layers(self, problems):
        says(
            problems(*self.SPLIT, "model.num_layers=3"),
            "parallel.pipeline_model_parallel_size 2",
            "parallel.virtual_pipeline_model_parallel_size 2 = 4 chunks",
            "model.num_layers is 3",
        )

    @pytest.mark.parametrize(
        ("layout", "part"),
        [
            ("[2, 2]", "parallel.layout has 2 chunks"),
            ("[2, 0, 1, 1]", "every chunk needs at least one layer"),
            ("[3, -1, 1, 1]", "every chunk needs at least one layer"),
            ("[2, 1, 1, 1]", "adds up to 5 layers, but model.num_layers is 4"),
            ("Ett|ttL", "parallel.layout 'Ett|ttL' has 2 chunks, but parallel.pipeline"),
            ("E(tt|)*3tL", "parallel.layout 'E(tt|)*3tL' adds up to 7 layers, but model.num_la"),
            ("E|(t|)*2ttL", "parallel.layout 'E|(t|)*2ttL': chunk 1 of 4 holds only E, but every"),
        ],
    )
    def test_explicit(self, problems, layout, part):
        says(problems(*self.SPLIT, f"parallel.layout={layout}"), part)

    @pytest.mark.parametrize("layout", ["[1, 3, 2, 1]", "Et|t*3|tt|tL", "auto", "even"])
    def test_right(self, problems, layout):
        assert problems(*self.SPLIT, "model.num_layers=7", f"parallel.layout={layout}") == []

    @pytest.mark.parametrize("layout", ["even", "auto"])
    def test_27_layers_on_32_chunks(self, problems, layout):
        found = problems(
            "model.num_layers=27",
            "parallel.pipeline_model_parallel_size=8",
            "parallel.virtual_pipeline_model_parallel_size=4",
            f"parallel.layout={layout}",
        )
        says(found, "32 chunks, but model.num_layers is 27: every chunk needs at least one layer")


class TestProcesses:
    @pytest.mark.parametrize(
        ("world_size", "remedy"),
        [
            (0, "start 3 "),
            (1, "start 3 "),
            (2, "start 3 "),
            (4, "start 3 or 6 "),
            (8, "start 6 or 9 "),
        ],
    )
    def test_no_whole_replica(self, problems, world_size, remedy):
        found = problems(
            "parallel.pipeline_model_parallel_size=3",
            "train.global_batch_size=60",
            world_size=world_size,
        )
        says(found, f"is {world_size}, but a replica of the model takes 3", remedy)

    def test_whole_replicas(self, problems, small):
        overrides = ("parallel.pipeline_model_parallel_size=2",)
        assert problems(*overrides, world_size=2) == problems(*overrides, world_size=8) == []
        assert data_parallel_size(small) == 1
        assert data_parallel_size(small, 8) == 8


class TestExperts:
    SIZE = "parallel.expert_model_parallel_size="

    @pytest.mark.parametrize(
        ("size", "parts"),
        [
            (3, ["num_experts 256 / 3 leaves 1 over", "take 2 or 4"]),
            (512, ["num_experts 256 / 512 leaves 256 over", "take 256"]),
        ],
    )
    def test_every_rank_has_as_many(self, problems, size, parts):
        found = problems(f"{self.SIZE}{size}", "train.global_batch_size=1536")
        says(found, f"expert_model_parallel_size is {size}, but", *parts)

    @pytest.mark.parametrize(
        ("world_size", "parts"),
        [
            (4, ["4 processes / 2 pipeline stages = 2 ranks of a stage", "start 8 processes"]),
            (12, ["12 processes / 2 pipeline stages = 6 ranks", "start 8 or 16 processes"]),
        ],
    )
    def test_replicas_share_them(self, problems, world_size, parts):
        overrides = ("parallel.pipeline_model_parallel_size=2", "train.global_batch_size=24")
        found = problems(*overrides, f"{self.SIZE}4", world_size=world_size)
        says(found, "expert_model_parallel_size is 4, but", *parts)

    def test_right(self, problems, small):
        overrides = ("parallel.pipeline_model_parallel_size=2", f"{self.SIZE}4")
        for world_size in (None, 8, 16):
            assert problems(*overrides, world_size=world_size) == []
        small.parallel.expert_model_parallel_size = 4
        assert data_parallel_size(small) == small.parallel.least_processes == 4
        assert data_parallel_size(small, 8) == 8


class TestBatch:
    def test_not_divisible(self, problems):
        says(
            problems("train.global_batch_size=10", "train.micro_batch_size=2", world_size=2),
            "train.global_batch_size 10 is not divisible by 4",
            "train.micro_batch_size 2 x 2 data-parallel",
            "take 8 or 12",
        )

    def test_smaller_than_one_round(self, problems):
        found = problems("train.global_batch_size=1", "train.micro_batch_size=3")
        says(found, "take 3")

    def test_stages_are_no_replicas(self, problems):
        overrides = ("parallel.pipeline_model_parallel_size=4", "train.global_batch_size=3")
        assert problems(*overrides, world_size=4) == []


class TestOptimisation:
    @pytest.mark.parametrize("betas", ["[0.9, 1]", "[-0.1, 0.9]"])
    def test_betas(self, problems, betas):
        says(problems(f"optimizer.betas={betas}"), "optimizer.betas is [", "below 1")

    def test_cosine_that_ends_within_the_warm_up(self, problems):
        warmup = "lr_schedule.warmup_iters=50"
        says(
            problems(warmup, "lr_schedule.decay_end_iter=50"),
            "lr_schedule.decay_end_iter is 50",
            "lr_schedule.warmup_iters 50",
        )
        assert problems(warmup, "lr_schedule.decay_end_iter=51") == []
        assert problems(warmup, "lr_schedule.kind=wsd", "lr_schedule.wsd_decay_iters=50") == []

    @pytest.mark.parametrize(
        ("kind", "key"),
        [
            ("cosine", "wsd_decay_iters"),
            ("wsd", "decay_end_iter"),
            ("constant", "decay_end_iter"),
            ("constant", "wsd_decay_iters"),
        ],
    )
    def test_a_decay_that_the_schedule_does_not_read(self, problems, kind, key):
        of_kind = f"lr_schedule.kind={kind}"
        found = problems(of_kind, f"lr_schedule.{key}=50")
        says(found, f"lr_schedule.{key} is not read with kind {kind}: remove it")
        assert problems(of_kind, f"lr_schedule.{key}=null") == []

    def test_a_run_may_be_cut_short_within_the_warm_up(self, problems):
        assert problems("lr_schedule.warmup_iters=500", "train.train_iters=5") == []


class TestData:
    @pytest.mark.parametrize("split", ["[0, 1]", "[1, -0.1]"])
    def test_split(self, problems, split):
        says(problems(f"data.split={split}"), "data.split is [")

    def test_nothing_left_to_validate_on(self, problems):
        assert problems("data.split=[1, 0]") == []
        found = problems("data.split=[1, 0]", "train.eval_interval=5")
        says(found, "train.eval_interval is 5", "data.split [1.0, 0.0]")

    @pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "indexed"])
    def test_a_corpus_that_needs_a_path(self, problems, kind):
        says(problems(f"data.corpus=[{{kind: {kind}}}]"), "data.corpus.0.path is missing", kind)

    @pytest.mark.parametrize("kind", ["file", "tiktoken"])
    def test_a_tokenizer_that_needs_a_path(self, problems, kind):
        says(problems(f"data.tokenizer.kind={kind}"), "data.tokenizer.path is missing", kind)

    def test_paths_that_nobody_would_read(self, problems):
        says(
            problems("data.corpus=[{kind: python-stdlib, path: mine.txt}]"),
            "data.corpus.0.path is not read with kind python-stdlib",
        )
        says(
            problems("data.tokenizer.path=x.json"), "data.tokenizer.path is not read with kind bpe"
        )

    def test_no_tokenizer_for_text(self, problems):
        found = problems("data.tokenizer.kind=none")
        says(found, "data.tokenizer.kind is none", "python-stdlib")


def test_all_problems_at_once(problems):
    found = problems(
        "parallel.pipeline_model_parallel_size=8", "train.global_batch_size=7", world_size=12
    )
    assert [text.split()[0] for text in found] == ["parallel.pipeline_model_parallel_size", "the"]
    found = problems("model.moe.num_experts=1", "data.split=[0, 0]", "optimizer.betas=[2, 2]")
    assert len(found) == 3


def test_what_starts_anew_without_a_checkpoint_to_start_from(problems):
    found = problems("checkpoint.reset=[optimizer]")
    says(found, "checkpoint.reset is ['optimizer']", "checkpoint.load, which is not set")
    assert problems("checkpoint.reset=[optimizer,schedule,data]") == []
