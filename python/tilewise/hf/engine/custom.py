"""The engine behind transformers' ``model.generate(custom_generate=...)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tilewise.errors import ArgumentError, UnsupportedError
from tilewise.hf.engine.generator import SpeculativeGenerator

__all__ = ["custom_generate"]


class custom_generate:
    """A function for ``model.generate(inputs, custom_generate=custom_generate(generator), ...)``.

    Args:
        generator: made from the model that will be asked. Temperature, top-k and top-p of the call must be the
            generator's, since its drafts have them too; logits processors and stopping criteria other than those, the
            length and the end-of-sequence tokens are refused by name.

    Raises:
        ArgumentError: settings that differ from the generator's, or another model.
        UnsupportedError: beams, several returned sequences, other processors or criteria, a streamer.

    Example:
        >>> import torch
        >>> from tilewise.hf.engine import SpeculativeGenerator, custom_generate
        >>> from tilewise.hf.testing import random_draft
        >>> model = random_draft()
        >>> with SpeculativeGenerator(model) as generator:
        ...     ids = model.generate(torch.tensor([[1, 2, 3]]), custom_generate=custom_generate(generator),
        ...                          max_new_tokens=5, do_sample=False)
        >>> ids.shape
        torch.Size([1, 8])
    """

    def __init__(self, generator: SpeculativeGenerator):
        self._generator = generator

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Called by transformers."""
        generator = self._generator
        if model is not generator.target:
            raise ArgumentError("this generator was made for another model; make one from the model that generates")
        self._check(logits_processor, stopping_criteria, generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prompts = [
            row if mask is None else row[mask[index].bool()] for index, row in enumerate(input_ids)
        ]  # padding says nothing
        ends = generation_config._eos_token_tensor  # type: ignore[attr-defined]
        stops = [] if ends is None else ends.tolist()
        wanted = int(generation_config.max_length) - input_ids.shape[1]  # type: ignore[arg-type]
        made = generator.generate(prompts, wanted, stop_tokens=stops)
        longest = max(len(each.tokens) for each in made)
        pad = generation_config._pad_token_tensor  # type: ignore[attr-defined]
        filler = int(pad) if pad is not None else 0
        rows = [each.tokens + [filler] * (longest - len(each.tokens)) for each in made]
        return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype).reshape(len(rows), longest)], dim=1)

    def _check(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        settings = self._generator.settings
        asked = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        if config.do_sample:
            asked["temperature"] = 1.0
            for processor in processors:
                if isinstance(processor, TemperatureLogitsWarper):
                    asked["temperature"] = float(processor.temperature)
                elif isinstance(processor, TopKLogitsWarper):
                    asked["top_k"] = int(processor.top_k)
                elif isinstance(processor, TopPLogitsWarper):
                    asked["top_p"] = float(processor.top_p)
        for name, value in asked.items():
            if value != getattr(settings, name):
                raise ArgumentError(
                    f"generate() asks for {name} {value}, the generator was made with {getattr(settings, name)}; "
                    "make it with the same (do_sample=False is temperature 0)"
                )
        known = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
        strange = [type(one).__name__ for one in processors if not isinstance(one, known)]
        strange += [
            type(one).__name__ for one in criteria if not isinstance(one, (MaxLengthCriteria, EosTokenCriteria))
        ]
        if strange:
            raise UnsupportedError(
                f"the engine cannot run {', '.join(sorted(set(strange)))}; use temperature, top_k, top_p, max_new_tokens "
                "and eos_token_id, or SpeculativeGenerator.generate(stop_strings=...)"
            )
        if config.num_beams != 1 or config.num_return_sequences != 1:
            raise UnsupportedError(
                "the engine generates one sequence for each prompt: num_beams and num_return_sequences 1"
            )
        if model_kwargs.get("streamer") is not None:
            raise UnsupportedError("the engine has no streamer; use SpeculativeGenerator.stream(...)")
