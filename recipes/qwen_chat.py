"""Qwen-4B learns to answer the way your conversations do, from OpenAI-style messages.

Every assistant turn is trained on, up to and including its end token, and nothing else: system prompts, questions and
tool results are context. The baseline's and the adapter's loss and perplexity on held-out answers stand side by side
in report.html and in MLflow, with what both answer. Short conversations share rows of up to --max_length tokens without
seeing each other; the run prints how many optimizer steps an epoch has then.

    python recipes/qwen_chat.py                                        # the sample conversations in recipes/data
    python recipes/qwen_chat.py --dataset_name path/to/chats.jsonl     # your own; a tenth is held out
    python recipes/qwen_chat.py --smoke                                # tiny model, generated chats, CPU, no network
    python recipes/qwen_chat.py --dry_run                              # settings, rows and tokens; nothing is loaded
    python recipes/qwen_chat.py --config mixture.yaml                  # several sets by weight: `datasets:` in the file
    python -m qvl.chat --adapter outputs/qwen_chat/RUN/adapter         # talk to what came of it

Model:  Qwen/Qwen3-4B-Instruct-2507 (main), 4-bit NF4 with double quantization; LoRA r=16 on all seven projections.
Data:   recipes/data/chat_sample.jsonl: 32 conversations to train and 8 to evaluate, which show the format and teach one
        habit (a closing line "In short: ..."). Other ChatML models and templates: --model_name_or_path.
Needs:  4.0 GiB at most in training, at 2.5 times the tokens/s of TRL's defaults (4B shape, one H100, RESULTS.md).
"""

from pathlib import Path

from qvl.recipe import Recipe, main

DEFAULTS = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "dataset_name": str(Path(__file__).resolve().with_name("data") / "chat_sample.jsonl"),
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    # QLoRA: the frozen weights take half a byte each and are computed with in bf16 (or what the GPU has).
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
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
    # Tokens; a longer conversation stops the run, or loses its last turns with --overlong truncate_turns.
    "max_length": 2048,
    # Short conversations share a row of that length and do not see each other; the batch counts such rows.
    "packing": True,
    "per_device_eval_batch_size": 8,
    # Loss and perplexity of the held-out answers come with every recipe; no text score tells a good chat answer.
    "scores": ["rouge_l"],
    "max_new_tokens": 128,
    "dataloader_num_workers": 2,
    "logging_steps": 5,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
}

SMOKE = {
    "model_name_or_path": "qvl/tiny-qwen3-chat",
    "dataset_name": "qvl/chats",
    "num_train_examples": 320,
    "num_eval_examples": 60,
    # There is nothing to save in a model of a million parameters.
    "load_in_4bit": False,
    "learning_rate": 5e-3,
    "max_steps": 40,
    # Tokens of a row, which holds about eight of these short chats.
    "max_length": 512,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "per_device_eval_batch_size": 30,
    "max_new_tokens": 40,
    "dataloader_num_workers": 0,
}

RECIPE = Recipe("qwen_chat", DEFAULTS, SMOKE)

if __name__ == "__main__":
    main(RECIPE)
