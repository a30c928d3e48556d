"""TRL's SFTTrainer with qvl's collator and honest throughput numbers."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from transformers import ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from qvl.collators import CompletionCollator
from qvl.compiled_layers import num_compiled_frames
from qvl.encode import ProcessingClass
from qvl.errors import UserError
from qvl.examples import without_images
from qvl.features import encoder_inputs
from qvl.frozen_vision import ask_no_gradient_of_vision
from qvl.held_out import means, token_sums
from qvl.memory_use import peak_gib, reset_peak
from qvl.processes import gathered, num_processes
from qvl.segment_attention import block_mask
from qvl.sharding import Sharding, keep_sums_in_full, sharding
from qvl.shared_prefix import SharedPrefixCollator
from qvl.trained_parts import TrainedPart, optimizer_groups, round_to_base, rounded_to_base
from qvl.trainer_callbacks import DivergenceWatchdog, EarlyStopping, Log, LogCallback, SaveOnTermination

# From a step to scores of answers that the model gives there.
ScoreAnswers = Callable[[int], dict[str, float]]


class CompletionTrainer(SFTTrainer):
    """SFTTrainer that also logs samples/s, tokens/s, the data-wait share of the time, peak GiB and compilations.

    Its held-out loss, accuracy and entropy are means over tokens, not over batches, and come with the perplexity. The
    training loss, the step and everything else is upstream's.
    """

    def __init__(
        self, score_answers: ScoreAnswers | None = None, parts: Sequence[TrainedPart] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._score_answers = score_answers
        self._parts = parts
        self._held_out_sums = torch.zeros(0)
        # Qwen-VL models declare that they take no `num_items_in_batch`, which makes Trainer average the losses of
        # micro-batches whatever their token counts: 4 x 1 and 1 x 4 then differ by a third. SFTTrainer's loss takes it.
        self.model_accepts_loss_kwargs = True
        self._flos_per_token: float | None = None
        self._interval_start = time.perf_counter()
        self._interval_wait_seconds = 0.0
        # Of one process since this training began or went on; an answer is a sample.
        self._num_answers = 0
        self._interval_first_answer = 0
        self._interval_first_token = 0.0
        self._num_compiled = num_compiled_frames()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Upstream's, with a group for each part that has a learning rate of its own; each keeps the schedule's shape.

        The groups go in where upstream's own optimizers with groups put theirs (`optimizer_cls_and_kwargs`).
        """
        if self.optimizer is None and any(part.learning_rate is not None for part in self._parts):
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            decaying = set(self.get_decay_parameter_names(model))
            groups = optimizer_groups(model, self._parts, decaying, self.args.learning_rate, self.args.weight_decay)
            self.optimizer_cls_and_kwargs = (optimizer_class, {**kwargs, "params": groups})
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """Upstream's, on rows as they are stored: it looks at their lengths, and examples would be decoded for that."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return super()._get_train_sampler(dataset.with_format(None))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Upstream's, with the time it waits for data and the answers it gets counted."""
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._interval_wait_seconds += time.perf_counter() - start
        self._num_answers += sum(_pop_num_answers(batch) for batch in batches)
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Upstream's, with what is easier made on the device than sent to it."""
        inputs = super()._prepare_inputs(inputs)
        inputs.pop("num_answers", None)
        # Rows that hold one sample each are short, and SDPA with a dense mask is the faster one there.
        if getattr(self.data_collator, "padding_free", False) and inputs["segment_ids"].is_cuda:
            inputs["block_mask"] = block_mask(inputs["segment_ids"])
        # What a trained projector computes here belongs to the forward pass.
        with self.compute_loss_context_manager():
            return encoder_inputs(inputs, self.model)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Upstream's, which is so much a token; it would count the model's weights anew for every batch."""
        num_tokens = inputs["input_ids"].numel()
        if self._flos_per_token is None:
            self._flos_per_token = super().floating_point_ops(inputs) / num_tokens
        return round(self._flos_per_token * num_tokens)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a batch; what it is the mean of is added up for `evaluation_loop`."""
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            sums = token_sums(self.accelerator.unwrap_model(model), inputs)
        # Samples that fill up the last batch of a process are left out here. It counts samples, and a padding-free
        # batch is one row of many: the sums are those of samples, not of rows.
        self._held_out_sums += self.accelerator.gather_for_metrics(sums.stacked()).sum(dim=0)
        return sums.losses.sum() / sums.num_tokens.sum().clamp(min=1), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Upstream's, with means over tokens in place of its mean of batches, and the scores of generated answers."""
        start = time.perf_counter()
        self._held_out_sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        # Data loaders draw seeds, and sampling is seeded: training must go the same with and without an evaluation.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # Outside of autocast, and with what would be saved now.
        with torch.random.fork_rng(devices=devices), rounded_to_base(self.model):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            found = means(self._held_out_sums.tolist())
            if self._score_answers is not None:
                found |= self._score_answers(self.state.global_step)
        # Here upstream's choice of the best checkpoint, its early stopping and its log all see them.
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        # Not time in which the training could have trained.
        self._interval_start += time.perf_counter() - start
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's, with throughput since the last training log added. One process's share, times their number.

        The last log has that of the whole training. Upstream counts rows there, which may hold one answer or many.
        """
        if "loss" in logs:
            seconds = time.perf_counter() - self._interval_start
            num_tokens = float(self._total_train_tokens)
            logs["samples_per_second"] = self._answers_per_second(self._interval_first_answer, seconds)
            if num_tokens:  # Unsloth's trainer counts none.
                logs["tokens_per_second"] = (num_tokens - self._interval_first_token) / seconds
            logs["data_wait_share"] = self._interval_wait_seconds / seconds
            logs["peak_gib"] = peak_gib()
            num_compiled = num_compiled_frames()
            if num_compiled:
                # 0 once all layers are compiled: anything else is a recompilation, which takes seconds.
                logs["num_compilations"] = num_compiled - self._num_compiled
                self._num_compiled = num_compiled
            self._interval_first_answer, self._interval_first_token = self._num_answers, num_tokens
            self._interval_start, self._interval_wait_seconds = time.perf_counter(), 0.0
        if "train_samples_per_second" in logs:
            logs["train_samples_per_second"] = self._answers_per_second(0, logs["train_runtime"])
        super().log(logs, start_time)

    def _answers_per_second(self, first: int, seconds: float) -> float:
        return (self._num_answers - first) * self.accelerator.num_processes / seconds

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Upstream's, with TRL's count of tokens in the state, where upstream has a place for one that is off here."""
        self.state.num_input_tokens_seen = self._total_train_tokens
        super()._save_checkpoint(model, trial)

    def count_tokens_on_from(self, checkpoint: Path) -> None:
        """Has `num_tokens` go on where a checkpoint was saved, as the steps do."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        self._total_train_tokens = state["num_input_tokens_seen"]
        self._interval_first_token = float(self._total_train_tokens)


def _pop_num_answers(batch: dict[str, Any]) -> int:
    """Answers in a batch: a row each, unless its collator says otherwise."""
    return int(batch.pop("num_answers", len(batch["input_ids"])))


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves in memory.

    Attributes:
        summary: the `train` part of metrics.json.
        terminated: SIGTERM ended it early, after a checkpoint.
    """

    summary: dict[str, float | None]
    terminated: bool


def require_loss_for(device: torch.device) -> None:
    """Stops a run on a CPU with a TRL whose loss exists as a Triton kernel only.

    Raises:
        UserError: trl < 1.16 without a GPU, unless Triton's interpreter is switched on.
    """
    if device.type == "cpu" and Version(trl.__version__) < Version("1.16") and not os.environ.get("TRITON_INTERPRET"):
        raise UserError(
            f"trl {trl.__version__} computes its loss with a Triton kernel, which needs a GPU: install trl 1.16 or "
            "newer to train on a CPU (or set TRITON_INTERPRET=1, which is slow)."
        )


def build_trainer(
    model: PeftModel,
    processing_class: ProcessingClass,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    args: SFTConfig,
    collator: CompletionCollator | SharedPrefixCollator,
    score_answers: ScoreAnswers | None = None,
    parts: Sequence[TrainedPart] = (),
) -> CompletionTrainer:
    """The trainer, with fp32 adapters whatever the base is.

    SFTTrainer casts the adapters of a quantized base to bf16, which a GPU without bf16 cannot scale and which loses
    updates smaller than 1/256 of a weight. So does it with parts that are trained whole; they keep the base's format
    where there is no autocast that would put fp32 and 16 bits together.
    """
    if not isinstance(processing_class, ProcessorMixin):
        train_dataset = without_images(train_dataset)
        eval_dataset = without_images(eval_dataset) if eval_dataset is not None else None
    # ZeRO-3 puts tensors together in one format; its optimizer keeps fp32 copies of its own.
    dtype = model.dtype if sharding() is Sharding.ZERO3 else torch.float32
    values = {name: p.data.to(dtype) for name, p in model.named_parameters() if p.requires_grad}
    trainer = CompletionTrainer(
        score_answers=score_answers,
        parts=parts,
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
    )
    keep_sums_in_full(getattr(trainer.accelerator.state, "fsdp_plugin", None))
    ask_no_gradient_of_vision(model)
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name]
    if not (args.bf16 or args.fp16):
        round_to_base(model)
    if num_processes() > 1:
        # Every process has loaded the same frozen base: what is sent at the start, and at each step where buffers hold
        # weights (fp8), is what is trained.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    return trainer


def train(
    trainer: CompletionTrainer, log: Log, resume_from: Path | None, early_stopping_patience: int | None = None
) -> TrainingResult:
    """Runs the training.

    Args:
        trainer: from `build_trainer`.
        log: called with every log and its step.
        resume_from: checkpoint folder to go on from.
        early_stopping_patience: evaluations without improvement of `metric_for_best_model` that end it; None for none.
    """
    scaler = lambda: s.get_scale() if (s := trainer.accelerator.scaler) is not None else None  # noqa: E731
    termination = SaveOnTermination()
    last: dict[str, float] = {}

    def keep(logs: dict[str, float], step: int) -> None:
        last.update(logs)
        log(logs, step)

    trainer.add_callback(LogCallback(keep))
    trainer.add_callback(DivergenceWatchdog(trainer.model, scaler))
    trainer.add_callback(termination)
    if early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(early_stopping_patience))
    if resume_from is not None:
        trainer.count_tokens_on_from(resume_from)
    reset_peak()
    start = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    seconds = time.perf_counter() - start
    summary = {
        "samples_per_second": output.metrics.get("train_samples_per_second"),
        "seconds": seconds,
        "peak_gib": max(gathered(peak_gib())),
        # A run shorter than --logging_steps has logged no loss of its own.
        "final_loss": last.get("loss", output.training_loss),
        "mean_loss": output.training_loss,
        "num_steps": output.global_step,
        "num_tokens": last.get("num_tokens"),
        "data_wait_share": last.get("data_wait_share"),
        **_best(trainer),
    }
    return TrainingResult(summary, termination.requested)


def _best(trainer: CompletionTrainer) -> dict[str, float]:
    """Which checkpoint `load_best_model_at_end` has loaded, and its metric."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_model_checkpoint is None or state.best_metric is None:
        return {}
    step = int(state.best_model_checkpoint.rpartition("-")[2])
    return {"best_step": step, "best_metric": state.best_metric}
