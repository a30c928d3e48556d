"""Sweep over recipes/qwen_chat.py: LoRA's learning rate, rank and dropout, judged by the loss of held-out answers.

python ray_jobs/qwen_chat_lora.py --num_samples 16            # on this machine, or the cluster it belongs to
python ray_jobs/qwen_chat_lora.py --smoke --ray_num_gpus 0    # tiny model, CPU
ray job submit --working-dir . -- python ray_jobs/qwen_chat_lora.py

Every other flag of the recipe may stand on the command line.
"""

import sys
from pathlib import Path

# A script's own folder is on the path, and the repository's root is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_jobs.axes import Range
from ray_jobs.sweep import Sweep, main

SWEEP = Sweep(
    recipe="recipes/qwen_chat.py",
    axes={
        "learning_rate": Range(5e-5, 5e-4, is_log=True),
        "lora_r": [8, 16, 32],
        "lora_dropout": [0.0, 0.05, 0.1],
    },
    metric="finetuned_loss",
    mode="min",
    num_samples=16,
    first_rung_steps=2,
)

if __name__ == "__main__":
    main(SWEEP)
