"""Sweep over recipes/flickr8k.py: LoRA's learning rate, rank and dropout, judged by BLEU-4.

python ray_jobs/flickr8k_lora.py --num_samples 16            # on this machine, or the cluster it belongs to
python ray_jobs/flickr8k_lora.py --smoke --ray_num_gpus 0    # tiny model, CPU
ray job submit --working-dir . -- python ray_jobs/flickr8k_lora.py

Every other flag of the recipe may stand on the command line.
"""

import sys
from pathlib import Path

# A script's own folder is on the path, and the repository's root is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_jobs.axes import Range
from ray_jobs.sweep import Sweep, main

SWEEP = Sweep(
    recipe="recipes/flickr8k.py",
    axes={
        "learning_rate": Range(5e-5, 5e-4, is_log=True),
        "lora_r": [8, 16, 32],
        "lora_dropout": [0.0, 0.05, 0.1],
    },
    metric="finetuned_bleu4",
    mode="max",
    num_samples=16,
    first_rung_steps=50,
)

if __name__ == "__main__":
    main(SWEEP)
