"""Keys under another name or in another form are answered with the override to write."""

from __future__ import annotations

import pytest

from attnres_train.config import ConfigError
from attnres_train.config.fields import all_keys, expected, locate
from attnres_train.config.foreign import NOTES, SWITCHES, WORDS, keys_for, plain
from attnres_train.config.meant import check_words, did_you_mean
from attnres_train.config.tree import parse_override
from tests.config.helpers import error_of, write


def problems(*words: str, options: tuple[str, ...] = ("-h", "--help", "--nproc")) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_words(words, options)
    return caught.value.problems


class TestWordsOfOthers:
    def test_every_target_is_a_key_that_holds_a_value(self):
        sections = {key.rpartition(".")[0] for key in all_keys()} - {"data.corpus"}
        assert set(WORDS) <= set(all_keys()) - sections

    def test_every_switch_is_an_override_that_holds(self):
        for override in SWITCHES.values():
            key, _, value = override.partition("=")
            (path,) = parse_override(override).texts
            wanted = locate(path, {})[1]
            assert key in all_keys()
            assert wanted in ("text", "true or false") or value in wanted, override

    def test_every_switch_and_note_is_about_a_word_that_is_known(self):
        for word in [*SWITCHES, *NOTES]:
            assert keys_for(word), word
        for word, override in SWITCHES.items():
            assert override.partition("=")[0] in keys_for(word)

    def test_words_are_plain_and_none_is_a_key_of_ours_as_it_stands(self):
        for row in WORDS.values():
            for word in row.split():
                assert plain(word) == word
                assert word not in all_keys()

    @pytest.mark.parametrize(
        ("word", "keys"),
        [
            ("learning_rate", ["optimizer.lr"]),
            ("lr", ["optimizer.lr"]),
            ("max_steps", ["train.train_iters"]),
            ("num_hidden_layers", ["model.num_layers"]),
            ("n_layers", ["model.num_layers"]),
            ("n_layer", ["model.num_layers"]),
            ("d_model", ["model.hidden_size"]),
            ("n_embd", ["model.hidden_size"]),
            ("tp", ["parallel.tensor_model_parallel_size"]),
            ("pp", ["parallel.pipeline_model_parallel_size"]),
            ("vpp", ["parallel.virtual_pipeline_model_parallel_size"]),
            ("ep", ["parallel.expert_model_parallel_size"]),
            ("cp", ["parallel.context_parallel_size"]),
            ("seq-length", ["train.seq_length"]),
            ("max_position_embeddings", ["train.seq_length"]),
            ("hidden-size", ["model.hidden_size"]),
            ("num-layers", ["model.num_layers"]),
            ("train-iters", ["train.train_iters"]),
            ("micro-batch-size", ["train.micro_batch_size"]),
            ("global-batch-size", ["train.global_batch_size"]),
            ("batch_size", ["train.micro_batch_size", "train.global_batch_size"]),
            ("num_attention_heads", ["model.kda.num_heads", "model.mla.num_heads"]),
            ("block_size", ["model.residual.block_size", "train.seq_length"]),
            ("warmup_steps", ["lr_schedule.warmup_iters"]),
            ("seed", ["run.seed"]),
            ("training.steps", ["train.train_iters"]),
        ],
    )
    def test_each_form_names_the_keys_and_repeats_the_value(self, tmp_path, word, keys):
        meant = "did you mean " + " or ".join(f"{key}=8" for key in keys) + "?"
        assert problems(f"--{word}=8") == [f"--{word}=8: {meant}"]
        assert problems(f"--{word}", "8") == [f"--{word} 8: {meant}"]
        assert problems(word, "8") == [f"{word} 8: {meant}"]
        assert problems(f"{word}:", "8") == [f"{word}: 8: {meant}"]
        assert problems(f"{word}:8") == [f"{word}:8: {meant}"]
        assert problems(word, "=", "8") == [f"{word} = 8: {meant}"]

    def test_as_a_key_on_the_command_line_and_in_a_file(self, tmp_path, small_file):
        assert error_of(small_file, "learning_rate=6e-4") == (
            "learning_rate (command line): unknown key; did you mean optimizer.lr=6e-4?"
        )
        child = write(
            tmp_path,
            "child.yaml",
            "extends: small.yaml\nbatch_size: 8\nmodel:\n  n_layer: 2\n",
        )
        assert error_of(child).splitlines() == [
            "2 problems:",
            f"  model.n_layer ({child}:4): unknown key; did you mean model.num_layers=2?",
            f"  batch_size ({child}:2): unknown key; did you mean train.micro_batch_size=8 or "
            "train.global_batch_size=8?",
        ]

    @pytest.mark.parametrize(
        ("words", "meant"),
        [
            (["--bf16"], "train.precision=bf16?"),
            (["--bf16", "true"], "train.precision=bf16?"),
            (["bf16=False"], "train.precision?"),
            (["--fp16"], "train.precision=bf16? (there is no fp16)"),
            (["--resume_from_checkpoint"], "checkpoint.resume=auto?"),
            (["resume_from_checkpoint=runs/a"], "checkpoint.resume=runs/a?"),
            (["--gradient-checkpointing"], "train.recompute=full?"),
            (["--use_wandb"], "log.wandb.enabled=true?"),
        ],
    )
    def test_switches(self, small_file, words, meant):
        if words[0].startswith("-"):
            (told,) = problems(*words)
        else:
            told = error_of(small_file, *words)
        assert told.endswith(f"did you mean {meant}")

    def test_a_value_of_another_meaning_is_not_repeated_as_ours(self):
        (told,) = problems("--gradient_accumulation_steps", "8")
        assert "--gradient_accumulation_steps 8: did you mean train.global_batch_size? (" in told
        assert "train.global_batch_size=8" not in told
        (told,) = problems("min_lr", "1e-5")
        assert told.endswith("lr_schedule.min_lr_ratio? (a share of optimizer.lr, not a rate)")

    def test_nearly_a_word_of_others(self):
        assert problems("--learnig_rate=1") == ["--learnig_rate=1: did you mean optimizer.lr=1?"]


class TestForms:
    @pytest.mark.parametrize(
        ("words", "meant"),
        [
            (["--train.train_iters=5"], "train.train_iters=5"),
            (["--train.train-iters", "5"], "train.train_iters=5"),
            (["train.train_iters", "5"], "train.train_iters=5"),
            (["train.train_iters: 5"], "train.train_iters=5"),
            (["train.train_iter", "5"], "train.train_iters=5"),
            (["--optimizer.lr", "-1"], "optimizer.lr=-1"),
            (["-lr", "1e-3"], "optimizer.lr=1e-3"),
            (["run.name", "two words"], "'run.name=two words'"),
            (["data.corpus.1.weight", "2"], "data.corpus.1.weight=2"),
            (["data.corpus.weight", "2"], "data.corpus.0.weight=2"),
            (["--optimizer.betas", "[0.8, 0.9]"], "'optimizer.betas=[0.8, 0.9]'"),
            (["model.residual.kind", "my_lab.residuals:Mine"], "model.residual.kind=my_lab.resi"),
        ],
    )
    def test_our_keys(self, words, meant):
        (told,) = problems(*words)
        assert f"did you mean {meant}" in told

    def test_proper_overrides_pass(self):
        assert check_words(["a=b", "train.stop_after=", "x=--y", "lr=3"]) == []

    def test_values_are_not_taken_for_keys_nor_keys_for_values(self):
        assert problems("--pp", "2", "train.train_iters=5", "tp", "4") == [
            "--pp 2: did you mean parallel.pipeline_model_parallel_size=2?",
            "tp 4: did you mean parallel.tensor_model_parallel_size=4?",
        ]
        assert problems("train.train_iters", "train.seq_length", "8") == [
            "train.train_iters has no value: write it as train.train_iters=VALUE",
            "train.seq_length 8: did you mean train.seq_length=8?",
        ]
        assert problems("train.train_iters", "--lr=3")[0].startswith("train.train_iters has no")
        assert problems("--bf16", "lr", "3") == [
            "--bf16: did you mean train.precision=bf16?",
            "lr 3: did you mean optimizer.lr=3?",
        ]

    def test_an_option_that_the_command_nearly_has(self):
        assert problems("--nproc_per_node", "4") == ["--nproc_per_node 4: did you mean --nproc 4?"]
        assert problems("--n=4") == ["--n=4: did you mean --nproc 4?"]
        assert problems("--nprco=4") == ["--nprco=4: did you mean --nproc 4?"]

    @pytest.mark.parametrize("option", ["--config", "-c", "--config-file", "--job.config_file"])
    def test_an_option_for_the_config(self, option):
        (told,) = problems(option, "a.yaml")
        assert told == f"{option} a.yaml: the config stands by itself, without an option"

    def test_a_word_that_is_nothing(self):
        assert problems("b.yaml") == [
            "override 'b.yaml': write it as key.path=value, for example train.train_iters=20"
        ]

    def test_options_that_are_nothing_are_handed_back(self):
        assert check_words(["a=1", "--fast", "--zzz", "3"]) == ["--fast", "--zzz"]
        assert problems("lr", "3", "--fast") == [
            "lr 3: did you mean optimizer.lr=3?",
            "--fast: unknown option",
        ]


def test_a_section_is_named_without_the_value():
    assert did_you_mean(("training",), None) == "did you mean train?"
    assert did_you_mean(("zzz",), "3") == ""


def test_the_words_for_a_number_with_two_bounds():
    assert expected(int, []) == "an integer"
    assert locate(("model", "residual", "num_streams"), {})[1] == (
        "an integer of at least 2 and at most 6"
    )
