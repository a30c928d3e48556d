"""A decoding loop whose step is one captured CUDA graph: a step of an 8B model launches a thousand small kernels.

`model.generate(custom_generate=GraphedDecoding())` is transformers' public place for such a loop; prompts, positions,
masks, sampling and stopping stay upstream's.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

# SDPA's masked kernel wants rows of a multiple of 8 elements, or it copies the mask.
CACHE_MULTIPLE_TOKENS = 16


class GraphedDecoding:
    """Decodes with a static cache; the step is captured once and replayed for every token and every later batch.

    Without CUDA every step runs as it is, and over 8-bit layers, which ask the device for outliers.

    Batches of one object have to be of one size, and none longer than the first: sort the longest first.

    Args:
        max_cache_tokens: longest prompt plus the tokens to be generated.
    """

    def __init__(self, max_cache_tokens: int) -> None:
        self.max_cache_tokens = -(-max_cache_tokens // CACHE_MULTIPLE_TOKENS) * CACHE_MULTIPLE_TOKENS
        self._cache: StaticCache | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Any] = {}
        self._logits = torch.empty(0)
        self._is_first = True
        self._can_capture = torch.cuda.is_available()

    def empty_cache(self, model: PreTrainedModel) -> StaticCache:
        """The cache to hand to `generate` as `past_key_values`: always the same memory, which the graph points into."""
        if self._cache is None:
            self._cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=self.max_cache_tokens)
        elif self._cache.layers[0].is_initialized:
            self._cache.reset()
        return self._cache

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Prefills eagerly, then replays.

        Args:
            model: what generates.
            input_ids: int64 (batch, longest prompt), left-padded.
            logits_processor: upstream's, with the sampling flags in it.
            stopping_criteria: upstream's: end token and length.
            generation_config: complete; a padding token is set.
            synced_gpus: not needed, every process decodes rows of its own.
            **model_kwargs: what `generate` prepared; `past_key_values` is `empty_cache`'s.

        Returns:
            int64 (batch, longest prompt + generated), rows that ended early padded.
        """
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            scores = logits_processor(input_ids, outputs.logits[:, -1].to(torch.float32, copy=True))
            if generation_config.do_sample:
                next_tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
            else:
                next_tokens = scores.argmax(dim=-1)
            next_tokens = torch.where(unfinished, next_tokens, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
            unfinished &= ~stopping_criteria(input_ids, None)
            if not unfinished.any():
                return input_ids
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
            if (types := inputs.get("mm_token_type_ids")) is not None:
                # transformers 5.17 hands over those of the whole row, and a captured step has one shape.
                inputs["mm_token_type_ids"] = types[:, -1:]
            outputs = CausalLMOutputWithPast(logits=self._step(model, inputs), past_key_values=self._cache)

    def _step(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits (batch, 1, vocabulary) of one more token; the memory is written again by the next call."""
        self._can_capture &= not getattr(model, "is_loaded_in_8bit", False)
        if self._graph is None and (self._is_first or not self._can_capture):
            # The first step runs as it is: libraries make their workspaces, which must not happen in a capture.
            self._is_first = False
            return model(**inputs, return_dict=True).logits
        if self._graph is None:
            self._graph = self._capture(model, inputs)
        if self._graph is None:
            return model(**inputs, return_dict=True).logits
        for own, given in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._logits

    def _capture(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.cuda.CUDAGraph | None:
        """Records a step without running it; None where that fails, as with a step that asks the device something."""
        self._inputs = _cloned(inputs)
        try:
            graph, self._logits = _captured(lambda: model(**self._inputs, return_dict=True).logits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._can_capture = False
            print(f"Decoding without a captured graph, which is slower: {error}", flush=True)
            return None
        return graph


def _tensors(inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """All tensors of a step's arguments; some models get a dict of masks, one for each kind of layer."""
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with tensors of their own, and everything else as it is."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else _cloned(value) if isinstance(value, dict) else value
        for key, value in inputs.items()
    }


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for every stream that it was ever used on."""
    return torch.cuda.Stream(device)


def _captured(work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Records what `work` launches, without running it.

    `torch.cuda.graph` would empty all caches before: the pinned memory of the batches to come among them, which would
    have to be made again.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What other threads do meanwhile, as the data loader's that pins memory, does not concern the capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = work()
        except BaseException:
            _abandon(graph)
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """Ends a capture that failed.

    Torch leaves the generator in it: the first dropout of a training would fail ("Offset increment outside graph
    capture").
    """
    with suppress(RuntimeError):
        graph.capture_end()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
