"""A tokenizer and transformers small enough for tests, made here."""

from pathlib import Path

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "film",
    "good",
    "bad",
    "dull",
    "fine",
    "the",
    "is",
    "very",
    "name",
    "eat",
)
BERT = {
    **{"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 40, "vocab_size": len(WORDS)},
}
LLAMA = {
    **{"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 40, "vocab_size": len(WORDS)},
    **{"tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
}


def make_tokenizer(folder: Path, cls: bool = True, shift: int = 0) -> Path:
    """Write a tokenizer of WORDS, with [CLS] and [SEP] around a text or without; `shift` moves the ids of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: i + shift * (i > 3) for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if cls:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")
    fast.save_pretrained(folder)
    return folder


def make_model(folder: Path, config: dict) -> Path:
    """Write a random model and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    own = dict(config)
    made = AutoConfig.for_model(own.pop("model_type"), **own)
    kind = AutoModelForCausalLM if config["model_type"] == "llama" else AutoModel
    kind.from_config(made).save_pretrained(folder)
    return make_tokenizer(folder, cls=config["model_type"] == "bert")
