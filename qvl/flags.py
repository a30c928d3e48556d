"""The flags that are qvl's own, the upstream flags it refuses, and older scripts' flags under their present names."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from qvl.errors import UserError

STAGES = ("check", "baseline", "train", "evaluate", "report")
DEFAULT_STAGES = STAGES[1:]
# What can be trained whole beside LoRA: `train_<name>` and `<name>_learning_rate`; see qvl/trained_parts.py.
TRAINABLE_PARTS = ("merger", "projector", "vision_tower")
# In their order: `align` trains the projector alone, `instruct` all that is asked for.
PHASES = ("align", "instruct")
LOADERS = ("transformers", "unsloth")
OVERLONG_POLICIES = ("error", "drop", "truncate_text", "truncate_turns")
_AT_LEAST_ONE = (
    "min_pixels",
    "max_pixels",
    "max_new_tokens",
    "early_stopping_patience",
    "captions_per_step",
    "generation_batch_size",
)
_SAMPLING = ("temperature", "top_p", "top_k")
_OF_VISION_ENCODER = ("vision_encoder_revision", "vision_mode", "num_image_tokens")


@dataclass
class RecipeArguments:
    """What a recipe needs beyond `trl.SFTConfig` and `trl.ModelConfig`.

    The `dataset_*` names are those of `trl.ScriptArguments`, sampling names those of `transformers.GenerationConfig`.
    """

    stages: list[str] = field(
        default_factory=lambda: list(DEFAULT_STAGES),
        metadata={"help": "Stages to run, in their natural order.", "choices": list(STAGES)},
    )
    smoke: bool = field(
        default=False, metadata={"help": "Tiny embedded model and generated scenes: CPU, no network, two minutes."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Resolve everything, survey the data, write settings.yaml, load no weights, stop."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder with captions.jsonl, JSONL file, qvl/scenes or qvl/chats."}
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several sets in place of dataset_name, mixed by weight: TRL's `datasets:` list in a YAML file "
            "(path, name, split, fraction); on the command line a path, or the same as a JSON object, for each set."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "`name` argument of datasets.load_dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    num_train_examples: int | None = field(default=None, metadata={"help": "Images to train on; none means all."})
    num_eval_examples: int | None = field(default=None, metadata={"help": "Images to evaluate on; none means all."})
    image_column: str = field(default="image", metadata={"help": "Column of the image in caption data sets."})
    caption_columns: list[str] = field(
        default_factory=lambda: [f"caption_{i}" for i in range(5)],
        metadata={"help": "Columns of the captions; all of them are references, the first ones are trained on."},
    )
    captions_per_image: int = field(default=1, metadata={"help": "How many captions of an image to train on."})
    instruction: str = field(
        default="Describe the image in one sentence.", metadata={"help": "User turn of caption rows."}
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Least pixels of an image after resizing."})
    max_pixels: int | None = field(default=None, metadata={"help": "Most pixels of an image after resizing."})
    overlong: str = field(
        default="error",
        metadata={
            "help": "Rows longer than max_length. Image tokens are never cut; truncate_turns leaves whole turns out.",
            "choices": list(OVERLONG_POLICIES),
        },
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Go on without unusable rows and count them."})
    allow_remote_images: bool = field(default=False, metadata={"help": "Fetch images named by an http(s) URL."})
    allow_outside_images: bool = field(default=False, metadata={"help": "Let `..` paths leave the data folder."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Prompts answered at a time; none: what fits a GPU, per_device_eval_batch_size on a CPU."},
    )
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of greedy decoding."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling mass."})
    top_k: int = field(default=50, metadata={"help": "Sample among the k likeliest tokens."})
    scores: list[str] = field(
        default_factory=lambda: ["bleu4", "rouge_l", "cider"],
        metadata={
            "help": "Scores of the answers: bleu1 to bleu4, rouge_l, cider, exact_match, anls, cer, the recipe's own."
        },
    )
    eval_generations: int = field(
        default=0,
        metadata={"help": "Answer this many evaluation prompts at each evaluation while training, and score them."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations in which metric_for_best_model does not improve."},
    )
    adapter: str | None = field(default=None, metadata={"help": "Start from (or evaluate) this adapter folder."})
    vision_encoder: str | None = field(
        default=None, metadata={"help": "CLIP that gives a text-only language model eyes: hub id or folder."}
    )
    vision_encoder_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the vision encoder."}
    )
    vision_mode: str = field(
        default="projector",
        metadata={
            "help": "How the language model gets to see: projected features of the vision encoder, or text alone (the "
            "row's own `caption`, else the encoder's zero-shot tags) without composing anything.",
            "choices": ["projector", "text"],
        },
    )
    num_image_tokens: int | None = field(
        default=None, metadata={"help": "Tokens an image becomes, pooled from its patches; none means all patches."}
    )
    phase: list[str] = field(
        default_factory=lambda: [PHASES[1]],
        metadata={
            "help": "Phases of the training: align (the projector alone), instruct (LoRA too), or both in this order.",
            "choices": list(PHASES),
        },
    )
    align_share: float = field(
        default=0.25, metadata={"help": "Share of the optimizer steps that align takes where both phases run."}
    )
    train_projector: bool = field(
        default=False, metadata={"help": "Train the projector too, whole: what maps CLIP to the language model."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; none means learning_rate."}
    )
    train_merger: bool = field(
        default=False,
        metadata={"help": "Train the merger too, whole: what maps vision to the language model (DeepStack's as well)."},
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower too, whole."})
    merger_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the merger; none means learning_rate."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; none means learning_rate."}
    )
    loader: str = field(
        default=LOADERS[0],
        metadata={
            "help": "What loads the base and places LoRA; unsloth needs environments/unsloth.txt and an NVIDIA GPU.",
            "choices": list(LOADERS),
        },
    )
    base_precision: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the frozen weights while training, none means --dtype; fp8 is the faster, and needs "
            "compute capability 8.9 (on a CPU: the same rounding, slower).",
            "choices": ["fp8"],
        },
    )
    cache_vision_features: bool = field(
        default=False,
        metadata={"help": "Let the frozen vision tower see every image once and keep what it gives on disk."},
    )
    vision_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the features, shared by runs; none means vision_features in qvl's own cache."},
    )
    vision_cache_gib: float = field(
        default=100.0, metadata={"help": "Most that the folder may fill; the longest unused features are evicted."}
    )
    shared_prefix: bool = field(
        default=True, metadata={"help": "Compute image and prompt once for all answers to them; off: once an answer."}
    )
    captions_per_step: int | None = field(
        default=None,
        metadata={"help": "Most answers to one prompt that share it, the others come at other steps; none means all."},
    )
    compile_layers: bool = field(
        default=True,
        metadata={
            "help": "Compile layers for training, on GPUs of compute capability 8.0 and up; not with --load_in_8bit."
        },
    )
    gpu_memory_gib: float | None = field(
        default=None, metadata={"help": "Plan for a card of this size in GiB; none: for the GPU that is there."}
    )
    ignore_memory_plan: bool = field(
        default=False, metadata={"help": "Start also where the memory plan says that it does not fit."}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep checkpoints/ once the run is done."})
    ray_num_gpus: float = field(
        default=1, metadata={"help": "GPUs that a Ray job or a trial of a sweep waits for; elsewhere it says nothing."}
    )

    def __post_init__(self) -> None:
        self.stages = [stage for stage in STAGES if stage in self.stages]
        self.datasets = [_mixture_entry(entry) for entry in self.datasets] if self.datasets else None
        if not self.stages:
            raise UserError(f"--stages is empty: name some of {', '.join(STAGES)}.")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: it has to be at least 1.")
        if self.eval_generations < 0:
            raise UserError(f"--eval_generations {self.eval_generations}: it cannot be below 0.")
        if self.gpu_memory_gib is not None and self.gpu_memory_gib < 1:
            raise UserError(f"--gpu_memory_gib {self.gpu_memory_gib:g}: it has to be at least 1.")
        if self.vision_cache_gib <= 0:
            raise UserError(f"--vision_cache_gib {self.vision_cache_gib:g}: it has to be above 0.")
        self._require_parts_that_go_together()
        self._require_vision_flags_that_go_together()
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature has to be above 0, --top_p above 0 and up to 1. Greedy: no --do_sample.")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: it cannot be below 0, which draws from all tokens.")
        for item in fields(self):
            if item.name in _SAMPLING and not self.do_sample and getattr(self, item.name) != item.default:
                raise UserError(f"--{item.name} has no effect without --do_sample: add it, or leave --{item.name} out.")

    def _require_parts_that_go_together(self) -> None:
        for part in TRAINABLE_PARTS:
            rate = getattr(self, f"{part}_learning_rate")
            if rate is not None and rate < 0:
                raise UserError(f"--{part}_learning_rate {rate:g}: it cannot be below 0.")
            # A recipe with a vision encoder has a rate for its projector, which may stay frozen all the same.
            is_default = part == "projector" and self.vision_encoder is not None
            if rate is not None and not getattr(self, f"train_{part}") and not is_default:
                raise UserError(
                    f"--{part}_learning_rate has no effect without --train_{part}: add it, or leave it out."
                )
            # What is kept of a CLIP is what its projector is given.
            if getattr(self, f"train_{part}") and self.cache_vision_features and part != "projector":
                raise UserError(
                    f"--train_{part} changes what --cache_vision_features would keep, which is what the merger gives "
                    "to the language model: leave one of them out."
                )

    def _require_vision_flags_that_go_together(self) -> None:
        for item in fields(self):
            is_changed = getattr(self, item.name) != item.default
            if item.name in _OF_VISION_ENCODER and is_changed and self.vision_encoder is None:
                raise UserError(f"--{item.name} has no effect without --vision_encoder: add it, or leave it out.")
        if self.vision_mode == "text" and self.cache_vision_features:
            raise UserError(
                "--cache_vision_features keeps what a projector is given, and --vision_mode text has none: leave one "
                "of them out."
            )
        self.phase = [phase for phase in PHASES if phase in self.phase]
        if not self.phase:
            raise UserError(f"--phase is empty: name some of {', '.join(PHASES)}.")
        # A recipe's default of both phases is no contradiction: with images as words `instruct` is all there is.
        if self.vision_mode == "text" and self.phase == ["align"]:
            raise UserError("--phase align trains a projector, and --vision_mode text has none: leave one of them out.")
        if "align" in self.phase and not self.train_projector:
            raise UserError("--phase align trains the projector, and --train_projector is off: switch it on.")
        if not 0 < self.align_share < 1:
            raise UserError(f"--align_share {self.align_share:g}: it has to be above 0 and below 1.")


def _mixture_entry(entry: Any) -> Any:
    """One entry of `datasets` as YAML gives it: a mapping; on the command line also a path."""
    if not isinstance(entry, str):
        return entry
    if not entry.lstrip().startswith("{"):
        return {"path": entry}
    try:
        return json.loads(entry)
    except json.JSONDecodeError as error:
        raise UserError(f'--datasets {entry} is no JSON ({error}): write {{"path": "...", "fraction": 1}}.') from error


_HUB = "qvl pushes nothing by itself: look at the report first, then `hf upload USER/NAME RUN_FOLDER/adapter`"
_STAGES = "the stages decide what runs: --stages check baseline train evaluate report"
_PACKING = "--packing fills rows best-fit decreasing (TRL's `bfd`) and cuts no sample; held-out rows are never packed"
_LOGITS = "the scores come from generated text; the trainer computes the held-out loss and keeps no logits"
_PREPARATION = "qvl turns rows into examples itself, see --dataset_name"
_LAUNCH = (
    "more than one process is started, and told how to share a model, by "
    "`accelerate launch --config_file environments/accelerate/{zero2,zero3,fsdp2}.yaml` (for DeepSpeed first: bash "
    "environments/setup_gpu_env.sh deepspeed)"
)
_LIGER = "deprecated upstream: use --model_init_kwargs '{\"use_kernels\": true}'"

# Upstream flags that qvl cannot honour, with the reason a user reads. A test walks every field of SFTConfig and
# ModelConfig: each either reaches the trainer or the model with the value given, or stands here.
REFUSED: dict[str, str] = {
    "do_train": _STAGES,
    "do_eval": _STAGES,
    "do_predict": _STAGES,
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "hub_token": "a token on a command line can be read by every process: set HF_TOKEN or run `hf auth login`",
    "packing_strategy": _PACKING,
    "eval_packing": _PACKING,
    "pad_to_multiple_of": "TRL has it for text only, and its vision collator refuses it with prompts and completions",
    "dataset_text_field": "plain text rows have no answer to train on; accepted rows are listed in the README",
    "dataset_kwargs": _PREPARATION,
    "dataset_num_proc": "rows are prepared lazily, in the data loader: use --dataloader_num_workers",
    "shuffle_dataset": "the trainer's sampler already shuffles with --seed (or --data_seed)",
    "truncation_mode": "images must never be cut: use --overlong error|drop|truncate_text|truncate_turns",
    "eos_token": "the chat template's end token is the one that is trained and that ends generation",
    "pad_token": "deprecated upstream, and the processors of Qwen bring theirs",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "label_smoothing_factor": "deprecated upstream: it needs a second forward pass with the full logits",
    "auto_find_batch_size": "a batch size found by trial differs between machines, so results would not compare",
    "remove_unused_columns": "it would remove the columns that examples are made of",
    "length_column_name": "train_sampling_strategy groups by a column that is made here, of text and visual tokens",
    "enable_jit_checkpoint": "SIGTERM already saves a checkpoint",
    "prediction_loss_only": _LOGITS,
    "include_for_metrics": _LOGITS,
    "batch_eval_metrics": _LOGITS,
    "eval_accumulation_steps": _LOGITS,
    "eval_do_concat_batches": _LOGITS,
    "eval_use_gather_object": _LOGITS,
    "label_names": "the collator names its labels `labels`",
    "bf16_full_eval": "it casts the adapters for good and training would go on with them: use --bf16",
    "fp16_full_eval": "it casts the adapters for good and training would go on with them: use --fp16",
    "logging_nan_inf_filter": "a NaN logged as the average of earlier losses cannot be seen: it is always off here",
    "include_num_input_tokens_seen": "the log counts them already, as num_tokens",
    "parallelism_config": "it cannot be written on a command line",
    # Upstream's own reading of it leaves a broken object behind where deepspeed is not installed, on which every
    # model that is made later in the process fails.
    "deepspeed": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "use_cache": "SFTTrainer never keeps a cache; generation always does",
    "lora_task_type": "Qwen models are causal language models",
    "lora_target_parameters": "adapters are placed by module path, which parameters do not have",
}

# Values that are refused although the flag as such is taken.
REFUSED_VALUES: dict[tuple[str, Any], str] = {
    ("completion_only_loss", False): "only answers are trained on; a loss on the prompt teaches the model to ask",
    ("remove_unused_columns", True): "it would remove the columns that examples are made of",
    ("use_peft", False): "qvl trains adapters on a frozen base",
    ("loss_type", "chunked_nll"): "deprecated upstream: nll is computed in chunks too",
}

# Flags of the scripts that came before, under their present names. Printed in the README as well.
RENAMED: dict[str, str] = {
    "max_seq_length": "max_length",
    "train_steps": "max_steps",
    "use_qlora": "load_in_4bit",
    "dataset_path": "dataset_name",
    "data_path": "dataset_name",
    "target_modules": "lora_target_modules",
    "adapter_dir": "adapter",
    "mode": "stages",
    "USE_MOCK": "smoke",
}
