"""Fine-tuning of Qwen language and vision-language models on one GPU: TRL underneath, recipes on top.

Importing this package is cheap on purpose (no torch, no transformers): recipes import it before they know
whether they will train at all. The submodules import what they need.
"""

__version__ = "0.1.0"
