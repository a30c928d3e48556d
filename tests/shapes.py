"""Configurations of the sizes of published models, for tests that count without weights."""

from typing import Any

from transformers import CLIPVisionConfig, LlavaConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3Config, Qwen3VLConfig

_VOCABULARY = 151936


def shape(name: str, num_layers: int | None = None, vocabulary: int | None = None) -> PretrainedConfig:
    """The configuration of a published model, perhaps with fewer layers or a smaller vocabulary."""
    changes: dict[str, Any] = {"num_hidden_layers": num_layers, "vocab_size": vocabulary}
    return _MAKERS[name]({key: value for key, value in changes.items() if value is not None})


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any], tied: bool, changes: dict[str, Any]) -> PretrainedConfig:
    text = {"vocab_size": _VOCABULARY, "num_key_value_heads": 8, "head_dim": 128, **text, **changes}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=1, video_token_id=2
    )


def _qwen3_vl_8b(changes: dict[str, Any]) -> PretrainedConfig:
    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "out_hidden_size": 4096}
    return _qwen3_vl(text, {**vision, "deepstack_visual_indexes": [8, 16, 24]}, False, changes)


def _qwen3_vl_2b(changes: dict[str, Any]) -> PretrainedConfig:
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 28}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "out_hidden_size": 2048}
    return _qwen3_vl(text, {**vision, "deepstack_visual_indexes": [5, 11, 17]}, True, changes)


def _qwen2_5_vl_7b(changes: dict[str, Any]) -> PretrainedConfig:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        **changes,
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "out_hidden_size": 3584}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=2)


def _qwen3(hidden: int, intermediate: int, heads: int, layers: int, changes: dict[str, Any]) -> Qwen3Config:
    values = {
        "vocab_size": _VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": layers,
        **changes,
    }
    return Qwen3Config(**values)


def _qwen3_4b(changes: dict[str, Any]) -> PretrainedConfig:
    config = _qwen3(2560, 9728, 32, 36, changes)
    config.tie_word_embeddings = True
    return config


def _clip_qwen3_14b(changes: dict[str, Any]) -> PretrainedConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    text = _qwen3(5120, 17408, 40, 40, changes)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, image_seq_length=256)


_MAKERS = {
    "Qwen3-VL-2B": _qwen3_vl_2b,
    "Qwen3-VL-8B": _qwen3_vl_8b,
    "Qwen2.5-VL-7B": _qwen2_5_vl_7b,
    "Qwen3-4B": _qwen3_4b,
    "CLIP + Qwen3-14B": _clip_qwen3_14b,
}
