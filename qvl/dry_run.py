"""What --dry_run shows: settings, model, rows and tokens, without loading a weight."""

from pathlib import Path
from typing import Any

from qvl.active_run import load_data
from qvl.adapters import lora_config, require_adapter
from qvl.data import LoadedData, separate_completions
from qvl.encode import ProcessingClass
from qvl.errors import HubError
from qvl.files import write_text_atomically
from qvl.image_crop import describe_crop
from qvl.image_words import images_as_words
from qvl.memory import plan_memory
from qvl.models import language_model_path, load_config, load_processing_class, skeleton
from qvl.rows import RowToExample
from qvl.settings import Settings
from qvl.survey import describe_lengths, training_lengths


def dry_run(settings: Settings, row_to_example: RowToExample | None, folder: Path) -> None:
    """Prints what a run would be. What cannot be looked at without a network is said and passed over.

    Args:
        settings: of the run.
        row_to_example: the recipe's own piece.
        folder: gets settings.yaml, to edit and feed back.

    Raises:
        UserError: bad rows, flags that do not fit the model, or no adapter where `--adapter` names one.
    """
    if settings.recipe.adapter is not None:
        require_adapter(Path(settings.recipe.adapter))
    folder.mkdir(parents=True, exist_ok=True)
    print("\n" + settings.to_yaml().partition("\n\n")[0])
    processing_class = data = None
    try:
        config = load_config(settings)
        processing_class = load_processing_class(settings)
        print("\n" + "\n".join(_describe_model(settings, config, processing_class)))
    except HubError as error:
        print(f"\nModel not looked at: {error}")
    try:
        data = load_data(settings, row_to_example, processing_class)
        print("\n" + "\n".join(data.summary.lines()))
        if processing_class is not None:
            print("\n".join(_describe_rows(data, settings, processing_class)))
    except HubError as error:
        print(f"\nData not looked at: {error}")
    if processing_class is not None:
        plan = plan_memory(settings, config, data, processing_class)
        if plan is not None:
            print("\n" + "\n".join(plan.lines()))
    path = folder / "settings.yaml"
    write_text_atomically(path, settings.to_yaml(for_any_machine=True))
    print(f"\nNothing was loaded or trained. Settings to edit and feed back with --config: {path}")


def _describe_model(settings: Settings, config: Any, processing_class: ProcessingClass) -> list[str]:
    empty = skeleton(config)
    adapter = settings.recipe.adapter
    lora = f"that of {adapter}" if adapter is not None else f"on {lora_config(empty, settings).target_modules}"
    count = sum(parameter.numel() for parameter in empty.parameters())
    options = settings.model
    bits = 4 if options.load_in_4bit else 8 if options.load_in_8bit else None
    quantized = f", language model in {bits}-bit" if bits else ""
    size = getattr(getattr(processing_class, "image_processor", None), "size", None)
    lines = [
        f"model {options.model_name_or_path}: {type(empty).__name__}",
        f"  {count:,} parameters, {options.dtype}{quantized}",
        f"  language model at {language_model_path(empty)}, LoRA {lora}",
    ]
    return [*lines, f"  images resized to {dict(size)} pixels"] if size else lines


def _describe_rows(data: LoadedData, settings: Settings, processing_class: ProcessingClass) -> list[str]:
    rows = data.train
    if settings.recipe.vision_mode == "text":
        # Tags take CLIP's weights.
        rows = images_as_words(rows, {})
        print("\nTags of images are not counted: they are found by --vision_encoder, which is not loaded here.")
    lengths = training_lengths(separate_completions(rows), processing_class)
    limit = settings.training.max_length
    num_long = sum(row.num_tokens > limit for row in lengths) if limit else 0
    lines = [*describe_lengths(lengths), *describe_crop(rows, processing_class)]
    return [*lines, f"  longer than --max_length {limit}: {num_long} rows (--overlong {settings.recipe.overlong})"]
