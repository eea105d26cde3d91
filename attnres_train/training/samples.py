"""Text that the model under training writes (`log.samples`)."""

from __future__ import annotations

from collections.abc import Mapping

from attnres_train.checkpoint.peers import Peers
from attnres_train.config.schema import RunConfig
from attnres_train.data.prepare import Prepared, open_tokenizer
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.over_ranks import decoder_of, led_by_main
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.text import complete, prompt_tokens
from attnres_train.model.chunk import ModelChunk
from attnres_train.observe.observer import Sample
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import Engine


class Samples:
    """What is written every ``log.samples.interval`` steps, by all ranks together. Nothing of the
    run changes by it: draws have generators of their own."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        chunks: Mapping[int, ModelChunk],
        engine: Engine,
        prepared: Prepared,
    ) -> None:
        """Collective. Raises UserError, on every rank, for a prompt that cannot be taken."""
        self.section, self.ranks, self.chunks = config.log.samples, ranks, chunks
        self.decoder = decoder_of(chunks, engine, ranks)
        self.tokenizer: Tokenizer | None = None
        self.prompts: list[list[int]] = []
        # The tokenizer works on the main rank alone.
        Peers(ranks.control).on_first(lambda: self._open(config, prepared))

    def _open(self, config: RunConfig, prepared: Prepared) -> None:
        self.tokenizer = open_tokenizer(config, prepared)
        if self.tokenizer is None:
            raise UserError("log.samples: there is no text without a tokenizer")
        for number, prompt in enumerate(self.section.prompts):
            name = f"log.samples.prompts.{number}"
            length = config.train.seq_length
            self.prompts.append(prompt_tokens(self.tokenizer, prompt, length, name))

    def due(self, step: int) -> bool:
        return step % self.section.interval == 0

    def write(self) -> list[Sample]:
        """A sample for each prompt, on the main rank; on others none. Collective."""
        for chunk in self.chunks.values():
            chunk.eval()
        found: list[Sample] = []
        sampling = Sampling(self.section.temperature)
        with led_by_main(self.decoder, self.ranks) as decoder:
            if decoder is not None:
                assert self.tokenizer is not None  # on the main rank
                new = self.section.max_new_tokens
                texts = complete(decoder, self.tokenizer, self.prompts, sampling, new)
                pairs = zip(self.section.prompts, texts, strict=True)
                found = [Sample(prompt, text.text) for prompt, text in pairs]
        for chunk in self.chunks.values():
            chunk.train()
        return found
