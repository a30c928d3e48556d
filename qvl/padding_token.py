"""A padding token that is never a label, where a tokenizer brings none or its end token."""

from transformers import PreTrainedTokenizerBase

from qvl.errors import UserError

# Best first: made for padding, then those that Qwen's and other ChatML vocabularies have and conversations do not use.
_CANDIDATES = (
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<unk>",
)


def ensure_padding_token(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str | None:
    """Gives a tokenizer a padding token of its own vocabulary; its end token stays a label.

    A tokenizer that pads with its end token gets another one too: the end token is trained on, and whatever finds
    padding by its id (the check of the first batches here, other tools later) would take answers' ends for padding.

    Args:
        tokenizer: changed in place.
        chat_template: what it writes into conversations is not taken.

    Returns:
        The token that was chosen, None if the tokenizer has a fit one.

    Raises:
        UserError: the vocabulary has no token to spare.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return None
    vocabulary = tokenizer.get_vocab()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (*_CANDIDATES, *special):
        is_free = token not in (tokenizer.eos_token, tokenizer.bos_token) and token not in chat_template
        if token in vocabulary and is_free:
            tokenizer.pad_token = token
            return str(token)
    raise UserError(
        f"The tokenizer of {tokenizer.name_or_path} has no padding token and no special token to spare for it: add one "
        '("pad_token" in its tokenizer_config.json).'
    )
