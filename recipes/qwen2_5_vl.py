"""Is QLoRA safe on Qwen2.5-VL? Checked before it is trained, not hoped.

The stage check measures what a training relies on: 4-bit weights where they belong and nowhere else, LoRA where it was
asked for, images that reach their own answers, sound numbers, answers that end, a base that stays as it was, adapters
that load and merge, and eight rows that can be learned by heart. Each check has a value and a bound; if one fails, the
process ends with 1. A short training and its evaluation follow.

    python recipes/qwen2_5_vl.py                        # check, train, evaluate, report
    python recipes/qwen2_5_vl.py --stages check         # the checks alone; works with every recipe
    python recipes/qwen2_5_vl.py --smoke                # tiny model, drawn scenes, CPU, no network
    python recipes/qwen2_5_vl.py --smoke --load_in_4bit false
    python recipes/qwen2_5_vl.py --dry_run              # settings, rows and tokens; nothing is loaded

Model:  Qwen/Qwen2.5-VL-7B-Instruct (main), 4-bit NF4 with double quantization. Vision tower and merger stay frozen and
        in 16 bits, LoRA sits in the language model.
Data:   jxie/flickr8k, 200 training and 50 validation photos: a short run that shows whether a long one makes sense.
Needs:  made for a 16 GB card such as the T4, which computes in fp16 since it has no bf16. Measured runs are in
        recipes/RESULTS.md.
"""

from qvl.recipe import Recipe, main

DEFAULTS = {
    "stages": ["check", "train", "evaluate", "report"],
    "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
    "dataset_name": "jxie/flickr8k",
    "dataset_train_split": "train",
    "dataset_test_split": "validation",
    "num_train_examples": 200,
    "num_eval_examples": 50,
    "captions_per_image": 1,
    "instruction": "Describe the image in one sentence.",
    # QLoRA: half a byte a weight in the language model; computed in bf16, or fp16 where the GPU has no bf16.
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    # A visual token is 28 x 28 pixels: 1,024 of them at most.
    "max_pixels": 1024 * 28 * 28,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "max_length": 2048,
    "per_device_eval_batch_size": 8,
    "max_new_tokens": 64,
    # A free Colab machine has two cores.
    "dataloader_num_workers": 2,
    "logging_steps": 5,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
}

SMOKE = {
    "model_name_or_path": "qvl/tiny-qwen2.5-vl",
    "dataset_name": "qvl/scenes",
    "dataset_test_split": "test",
    "num_train_examples": 120,
    "num_eval_examples": 40,
    "learning_rate": 5e-3,
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_new_tokens": 40,
    "dataloader_num_workers": 0,
}

RECIPE = Recipe("qwen2_5_vl", DEFAULTS, SMOKE)

if __name__ == "__main__":
    main(RECIPE)
