"""A text-only Qwen learns to see: CLIP's eyes, a projector that is trained, and LoRA on the frozen 4-bit model.

CLIP turns a picture into 256 patches, a projector of two layers turns each patch into an embedding of the language
model, and these stand where `<image>` stands in the prompt. First the projector is aligned alone, then LoRA trains with
it (`--phase`). The baseline is the same composition with an untrained projector: it sees nothing yet.

    python recipes/qwen_clip.py --dataset_name path/to/rows.jsonl              # align, instruct, evaluate, compare
    python recipes/qwen_clip.py --smoke                                        # tiny CLIP and tiny Qwen3, CPU, offline
    python recipes/qwen_clip.py --dry_run --dataset_name path/to/rows.jsonl    # settings, rows and tokens
    python recipes/qwen_clip.py --dataset_name path/to/rows.jsonl --num_image_tokens 64     # pooled: 64, 16, 4 or 1
    python recipes/qwen_clip.py --dataset_name path/to/rows.jsonl --cache_vision_features   # CLIP sees an image once
    python recipes/qwen_clip.py --dataset_name path/to/rows.jsonl --vision_mode text        # no projector: tags
    python recipes/qwen_clip.py --model_name_or_path Qwen/Qwen2.5-14B-Instruct --dataset_name path/to/rows.jsonl
    python -m qvl.chat --adapter outputs/qwen_clip/RUN/adapter              # talk to it; /image PATH shows a picture

Models: Qwen/Qwen3-14B (main), 4-bit NF4 with double quantization; openai/clip-vit-large-patch14 (main), frozen.
Data:   jxie/flickr8k unless you name your own: JSON lines of {"image", "instruction", "response"}, or any other format.
        CLIP's image processor cuts pictures to their middle square; see the README for whole ones.
Needs:  a 24 GB card: training holds 13.7 GiB at most (14B and CLIP-L shapes on one H100, recipes/RESULTS.md).
"""

from qvl.recipe import Recipe, main

DEFAULTS = {
    "model_name_or_path": "Qwen/Qwen3-14B",
    "vision_encoder": "openai/clip-vit-large-patch14",
    # All patches of a picture of 224 x 224 pixels, 14 x 14 each.
    "num_image_tokens": 256,
    "dataset_name": "jxie/flickr8k",
    "dataset_train_split": "train",
    "dataset_test_split": "validation",
    "num_eval_examples": 500,
    "instruction": "Describe the image in one sentence.",
    # QLoRA: half a byte a weight in the language model; CLIP and projector stay in 16 bits.
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    # A quarter of the steps for the projector alone, at LLaVA's learning rate for it; then both.
    "phase": ["align", "instruct"],
    "align_share": 0.25,
    "train_projector": True,
    "projector_learning_rate": 1e-3,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "max_steps": 2000,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 12,
    "gradient_checkpointing": True,
    "max_length": 2048,
    "per_device_eval_batch_size": 8,
    "max_new_tokens": 64,
    "dataloader_num_workers": 4,
    "logging_steps": 5,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
}

SMOKE = {
    "model_name_or_path": "qvl/tiny-qwen3-text",
    "vision_encoder": "qvl/tiny-clip",
    # 8 x 8 patches.
    "num_image_tokens": 64,
    "dataset_name": "qvl/scenes",
    "dataset_test_split": "test",
    "num_train_examples": 1000,
    "num_eval_examples": 60,
    "captions_per_image": 5,
    # There is nothing to save in a model of a million parameters.
    "load_in_4bit": False,
    "projector_learning_rate": 1e-2,
    "learning_rate": 5e-3,
    "max_steps": 220,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "cache_vision_features": True,
    "per_device_eval_batch_size": 30,
    "max_new_tokens": 40,
    "dataloader_num_workers": 0,
}

RECIPE = Recipe("qwen_clip", DEFAULTS, SMOKE)

if __name__ == "__main__":
    main(RECIPE)
