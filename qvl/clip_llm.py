"""A CLIP and a text-only language model as one: transformers' own LLaVA classes, put together from two checkpoints.

Generation, saving, PEFT and serving then need no modelling code of ours. What is ours: which row of the vocabulary
stands for an image, a chat template that takes images, and fewer tokens an image where that is asked for
(`qvl.image_projector`).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging

from qvl.errors import UserError
from qvl.hub_errors import hub_errors_explained
from qvl.image_projector import ImageProjector, choose_image_tokens, image_token_counts
from qvl.image_template import with_images
from qvl.model_names import model_source
from qvl.settings import Settings

IMAGE_TOKEN = "<image>"
# LLaVA's choice: the last layer but one, without the token that stands for the whole image.
_FEATURE_LAYER = -2
_FEATURE_STRATEGY = "default"
# How trained_with.json begins to say that patches are pooled.
_NEEDS_QVL = "needs qvl"


def is_composed(settings: Settings) -> bool:
    """Whether the run's model is put together from two: `--vision_encoder`, and images go through a projector."""
    return settings.recipe.vision_encoder is not None and settings.recipe.vision_mode == "projector"


def load_vision_config(settings: Settings) -> CLIPVisionConfig:
    """The configuration of `--vision_encoder`'s tower; reads the hub or its cache, no weights.

    Raises:
        UserError: it is no CLIP.
    """
    name = str(settings.recipe.vision_encoder)
    with hub_errors_explained(name):
        config = AutoConfig.from_pretrained(model_source(name), revision=settings.recipe.vision_encoder_revision)
    vision = config.vision_config if isinstance(config, CLIPConfig) else config
    if not isinstance(vision, CLIPVisionConfig):
        raise UserError(
            f"--vision_encoder {name} is a {config.model_type} model and no CLIP, whose image tower is needed here: "
            "name one, such as openai/clip-vit-large-patch14."
        )
    vision._commit_hash = getattr(config, "_commit_hash", None)
    return vision


def composed_config(settings: Settings, text: PretrainedConfig) -> LlavaConfig:
    """The configuration of the whole.

    Args:
        settings: names both checkpoints and `--num_image_tokens`.
        text: the language model's.

    Raises:
        UserError: a language model that sees by itself, one whose vocabulary has no row to spare, or a tower that does
            not go with the rest.
    """
    name = str(settings.model.model_name_or_path)
    if type(text) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--vision_encoder gives eyes to a text-only language model; {name} is a {text.model_type} model. Leave "
            "--vision_encoder out, or name a language model such as Qwen/Qwen3-14B."
        )
    vision = load_vision_config(settings)
    num_image_tokens = choose_image_tokens(
        vision, settings.recipe.num_image_tokens, str(settings.recipe.vision_encoder)
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_image_token_row(name, settings.model.model_revision, text.vocab_size),
        image_seq_length=num_image_tokens,
        vision_feature_layer=_FEATURE_LAYER,
        vision_feature_select_strategy=_FEATURE_STRATEGY,
        tie_word_embeddings=text.tie_word_embeddings,
        # Tells `models.skeleton` that the projector is ours; transformers keeps what it does not know.
        is_composed=True,
    )
    config.dtype = text.dtype
    config._name_or_path, config._commit_hash = model_source(name), getattr(text, "_commit_hash", None)
    return config


@functools.lru_cache(maxsize=16)
def _image_token_row(name: str, revision: str | None, num_rows: int) -> int:
    return add_image_token(_load_tokenizer(name, revision), num_rows, name)


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    with hub_errors_explained(name):
        return AutoTokenizer.from_pretrained(model_source(name), revision=revision)


def add_image_token(tokenizer: PreTrainedTokenizerBase, num_rows: int, name: str) -> int:
    """Gives `<image>` the first row of the vocabulary that no token has; embeddings keep their size.

    What lies in that row is never looked at: features take its place.

    Args:
        tokenizer: of the language model; changed in place.
        num_rows: of its embedding table, which is padded beyond the tokenizer's tokens.
        name: of the model, for messages.

    Returns:
        The row.

    Raises:
        UserError: every row has a token.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    row = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if row >= num_rows:
        raise UserError(
            f"{name} has {num_rows:,} rows of vocabulary and a token in each, so none is free for {IMAGE_TOKEN}: name "
            "a model whose vocabulary is padded (Qwen3 has 267 free rows, Qwen2.5-14B has 399)."
        )
    return row


def composed_processor(settings: Settings, text: PretrainedConfig) -> LlavaProcessor:
    """LLaVA's processor: CLIP's pictures, the language model's tokenizer, and its chat template with image parts.

    Pooled tokens are larger patches to it.

    Args:
        settings: of the run.
        text: the language model's configuration.

    Raises:
        UserError: the two do not go together, or the language model has no chat template.
    """
    name, encoder = str(settings.model.model_name_or_path), str(settings.recipe.vision_encoder)
    vision = load_vision_config(settings)
    num_image_tokens = choose_image_tokens(vision, settings.recipe.num_image_tokens, encoder)
    tokenizer = _load_tokenizer(name, settings.model.model_revision)
    add_image_token(tokenizer, text.vocab_size, name)
    with hub_errors_explained(encoder):
        image_processor = AutoImageProcessor.from_pretrained(
            model_source(encoder), revision=settings.recipe.vision_encoder_revision
        )
    side = vision.image_size
    if (image_processor.crop_size["height"], image_processor.crop_size["width"]) != (side, side):
        raise UserError(
            f"--vision_encoder {encoder} sees {side} x {side} pixels, but its image processor makes pictures of "
            f"{image_processor.crop_size['width']} x {image_processor.crop_size['height']}: mend its "
            "preprocessor_config.json."
        )
    template = tokenizer.chat_template
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=side // round(num_image_tokens**0.5),
        vision_feature_select_strategy=_FEATURE_STRATEGY,
        chat_template=with_images(template, IMAGE_TOKEN) if template is not None else None,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def load_tower(settings: Settings, device: torch.device, dtype: Any) -> CLIPVisionModel:
    """The image tower of `--vision_encoder`, never quantized.

    Args:
        settings: of the run.
        device: where it computes.
        dtype: of its weights.
    """
    name = str(settings.recipe.vision_encoder)
    verbosity = logging.get_verbosity()
    # A CLIP has a text tower too, which upstream would list as a hundred weights that found no place.
    logging.set_verbosity_error()
    try:
        with hub_errors_explained(name):
            tower = CLIPVisionModel.from_pretrained(
                model_source(name), revision=settings.recipe.vision_encoder_revision, dtype=dtype
            )
    finally:
        logging.set_verbosity(verbosity)
    return tower.to(device)


def compose(empty: PreTrainedModel, language: PreTrainedModel, tower: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Puts loaded parts into a model without weights; nothing is copied.

    Args:
        empty: `models.skeleton` of `composed_config`.
        language: the language model, quantized or not, on its device.
        tower: the image tower there.
        seed: of the projector's weights, which are drawn as LLaVA draws them.

    Returns:
        The model, whose image tower keeps no gradients.
    """
    model: Any = empty
    core = model.model
    core.language_model, core.vision_tower = language.base_model, tower
    model.lm_head = language.get_output_embeddings()
    # One object each, so that what is said to the whole (an attention, for one) reaches the parts.
    model.config.text_config, model.config.vision_config = language.config, tower.config
    model.generation_config = language.generation_config
    # What quantization left on the language model: upstream asks the whole for it.
    for name, value in vars(language).items():
        if name not in vars(model):
            setattr(model, name, value)
    if getattr(language.config, "quantization_config", None) is not None:
        model.config.quantization_config = language.config.quantization_config
    core.multi_modal_projector = _drawn_projector(model.config, tower, seed)
    see_without_gradients(model)
    return cast(PreTrainedModel, model.eval())


def _drawn_projector(config: LlavaConfig, tower: PreTrainedModel, seed: int) -> ImageProjector:
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(config.get_text_config(), "initializer_range", 0.02)
    projector = ImageProjector(config)
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=spread, generator=generator)
        nn.init.zeros_(layer.bias)
    return projector.to(tower.device, tower.dtype)


def with_image_projector(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Puts our projector in the place of LLaVA's, with its weights."""
    with torch.device("meta"):
        projector = ImageProjector(model.config)
    projector.load_state_dict(model.model.multi_modal_projector.state_dict(), assign=True)
    model.model.multi_modal_projector = projector
    return model


def see_without_gradients(model: PreTrainedModel) -> None:
    """Runs the image tower under `no_grad`, whatever hooks say.

    transformers makes the input of every part require gradients where activations are checkpointed, CLIP's too, which
    would then keep its activations for a backward pass that nobody needs.
    """
    tower = cast(Any, model).model.vision_tower
    tower.requires_grad_(False)
    tower.forward = torch.no_grad()(tower.forward)


def composition_record(settings: Settings, model: PreTrainedModel) -> dict[str, Any]:
    """What trained_with.json says of a composition beside its language model: all that it takes to make it again.

    Args:
        settings: of the run.
        model: the base.

    Returns:
        JSON-able; empty for a model that is not composed.
    """
    if not is_composed(settings):
        return {}
    config = model.config
    is_pooled = config.image_seq_length < image_token_counts(config.vision_config)[0]
    return {
        "vision_encoder": settings.recipe.vision_encoder,
        "vision_encoder_revision": settings.recipe.vision_encoder_revision,
        "vision_encoder_commit": getattr(config.vision_config, "_commit_hash", None),
        "num_image_tokens": config.image_seq_length,
        "image_token_row": config.image_token_id,
        "serving": f"{_NEEDS_QVL}, which pools the patches of an image before it projects them: `python -m qvl.chat`"
        if is_pooled
        else "`python -m qvl.chat` puts its base together from the two checkpoints, and `python -m qvl.export --format "
        "merged` makes a LlavaForConditionalGeneration for plain transformers of it",
    }


def needs_qvl(trained: Mapping[str, Any]) -> bool:
    """Whether plain transformers cannot serve a composition, not even merged, by its trained_with.json."""
    return str(trained.get("serving")).startswith(_NEEDS_QVL)


def require_same_composition(model: PreTrainedModel, trained: Mapping[str, Any], folder: Path) -> None:
    """Stops where an adapter's projector was trained for another composition.

    Args:
        model: the base that the adapter is to be put on.
        trained: what trained_with.json says; empty where there is none.
        folder: of the adapter, for the message.

    Raises:
        UserError: another number of tokens an image, or another row of the vocabulary stands for them.
    """
    if not getattr(model.config, "is_composed", False) or "num_image_tokens" not in trained:
        return
    for key, flag, here in (
        ("num_image_tokens", "--num_image_tokens", model.config.image_seq_length),
        ("image_token_row", "--model_name_or_path", model.config.image_token_id),
    ):
        if trained[key] != here:
            raise UserError(
                f"The adapter in {folder} was trained with {key} {trained[key]}, and this base has {here}: give the "
                f"{flag} of its training."
            )
