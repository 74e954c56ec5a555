"""Transformers of Hugging Face for text: classification and language modeling, trained whole or in part.

A model here reads token ids (N, T) whose padding, on either side, is -1. Mask, positions and token types follow from
the ids and have a row per sequence, so that the gradients of sequences can be told apart. A pad is seen by no token.

Dropout is switched off: under differential privacy its noise comes on top of that in the gradient.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Train = Literal["full", "lora", "bitfit", "head"]


class Transformer(nn.Module):
    """A model of `transformers` that reads token ids alone.

    Args:
        network: of `transformers`; a base model with a head, else one that returns logits.
        head: of a classifier, reads the mean over tokens of the last layer; None where the network returns logits.

    Attributes:
        network: the model.
        head: its head.
        max_length: the longest sequence that the network reads; None for any.
        vocabulary: number of tokens that the network knows.
        causal: whether a token sees only those before it.
    """

    def __init__(self, network: Any, head: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.head = network, head
        config = network.config
        self._arguments = set(inspect.signature(network.forward).parameters)
        self.causal = not _reads_both_ways(network)
        table = next((m for name, m in network.named_modules() if name.endswith("position_embeddings")), None)
        padding = getattr(table, "padding_idx", None)
        self._first = 0 if padding is None else padding + 1  # RoBERTa counts positions from behind its padding
        self.vocabulary = int(config.vocab_size)
        self._pad = int(config.pad_token_id or 0)  # by which a decoder's own head finds the last token
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self.max_length = None if longest is None else int(longest) - self._first

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits: (N, classes) of a classifier, (N, T, vocabulary) of a language model."""
        present = tokens >= 0
        given: dict[str, Any] = {
            "input_ids": tokens.masked_fill(~present, self._pad),
            "attention_mask": self._mask(present),
        }
        given["position_ids"] = (present.cumsum(1) - 1).clamp(min=0) + self._first
        given["token_type_ids"] = torch.zeros_like(tokens)
        given["use_cache"] = False
        outputs = self.network(**{name: value for name, value in given.items() if name in self._arguments})
        if self.head is None:
            logits: Tensor = outputs.logits
            return logits
        hidden, weights = outputs.last_hidden_state, present[..., None]
        mean = hidden.masked_fill(~weights, 0.0).sum(1) / weights.sum(1).clamp(min=1).to(hidden.dtype)
        scores: Tensor = self.head(mean)
        return scores

    def _mask(self, present: Tensor) -> Tensor:
        """Compute what attention adds to scores, (N, 1, T, T).

        A token sees tokens, a pad sees itself.
        """
        length = present.shape[1]
        itself = torch.eye(length, dtype=torch.bool, device=present.device)
        seen = present[:, None].expand(-1, length, length)
        if self.causal:
            seen = seen & torch.ones_like(itself).tril()
        dtype = next(self.network.parameters()).dtype
        dtype = (
            torch.get_autocast_dtype(present.device.type) if torch.is_autocast_enabled(present.device.type) else dtype
        )
        lowest = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=present.device).masked_fill(~(seen | itself), lowest)[
            :, None
        ]


def transformer(
    path: str | None = None,
    config: Mapping[str, Any] | None = None,
    train: Train = "full",
    pooling: Literal["mean"] | None = None,
    lora: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    pretrained_on: str | None = None,
    num_classes: int | None = None,
) -> Transformer:
    """Build a transformer for classification or, without `num_classes`, for language modeling.

    Args:
        path: name on the Hugging Face hub, a local folder, or a .gguf file of quantized weights, which are dequantized.
        config: the architecture, `model_type` and what differs from its defaults; read from `path` where it is None.
        train: `full` for all parameters, `lora` for adapters (Hu et al., 2106.09685), `bitfit` for biases (Ben Zaken et
            al., 2106.10199), `head` for the classifier alone. The classifier is always trained.
        pooling: `mean` classifies the mean over tokens by a new linear layer; None leaves it to the network's own head.
        lora: of adapters, `rank` (8), `alpha` (16), so that they are scaled by alpha / rank, and `targets`, ends of the
            names of layers that get one (null: all linear layers but the output).
        pretrained: load weights from `path`; False to start at random.
        pretrained_on: what the weights were trained on, separated by commas; ε does not cover it.
        num_classes: size of the output.

    Raises:
        ValueError: for arguments that do not go together.
        FileNotFoundError: when `path` cannot be read or downloaded.
    """
    _check_parts(train, pooling, num_classes)
    network = _network(path, config, pretrained, num_classes, pooling)
    _switch_dropout_off(network)
    head = _new_head(network, num_classes) if pooling and num_classes else None
    own = _own_head(network) if num_classes is not None and not pooling else []
    model = Transformer(network, head)
    if num_classes is None and not model.causal:
        kind = type(network).__name__
        raise ValueError(
            f"{kind} sees the tokens that it should write: choose a model that writes text, model=gpt2 say"
        )
    if train == "lora":
        model.network = _with_adapters(network, lora or {}, own)
    elif train != "full":
        _train_only(network, train, own)
    return model


def write(model: Transformer, folder: Path, adapter: bool = False) -> None:
    """Write a model so that plain `transformers` loads it.

    A new head goes to `head.safetensors` next to it.

    Args:
        model: a trained one; LoRA adapters are merged into its copy on disk, and the model itself is used up.
        folder: made if there is none.
        adapter: write the LoRA adapter alone, for `peft`.

    Raises:
        ValueError: for an adapter of a model that has none.
    """
    from safetensors.torch import save_file

    network: Any = model.network
    has_adapter = hasattr(network, "merge_and_unload")
    if adapter and not has_adapter:
        raise ValueError("this model was not trained with model.train=lora: leave adapter=true out")
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapter and not adapter:
        network = network.merge_and_unload()
    network.save_pretrained(folder)
    if model.head is not None:
        save_file({name: x.contiguous() for name, x in model.head.state_dict().items()}, folder / "head.safetensors")


def _check_parts(train: str, pooling: str | None, num_classes: int | None) -> None:
    if train not in ("full", "lora", "bitfit", "head"):
        raise ValueError(f"model.train={train} must be full, lora, bitfit or head")
    if num_classes is None and (train == "head" or pooling):
        raise ValueError("a language model has no separate head to train: set model.train=full or lora, pooling=null")
    if pooling not in (None, "mean"):
        raise ValueError(f"model.pooling={pooling} must be mean or null")


def _new_head(network: Any, num_classes: int) -> nn.Linear:
    """Make a linear layer for classes, in the place of what reads the first token."""
    network.pooler = None
    head = nn.Linear(network.config.hidden_size, num_classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _network(
    path: str | None,
    config: Mapping[str, Any] | None,
    pretrained: bool,
    num_classes: int | None,
    pooling: str | None,
) -> Any:
    """Load or build a model of `transformers` in float32."""
    transformers = import_transformers()
    if path is None and config is None:
        raise ValueError("a transformer needs weights or an architecture: set model.path to a name or a folder")
    kind = transformers.AutoModelForCausalLM if num_classes is None else transformers.AutoModelForSequenceClassification
    kind = transformers.AutoModel if pooling else kind
    options: dict[str, Any] = {} if num_classes is None or pooling else {"num_labels": num_classes}
    with unavailable(f"model.path={path}"):
        made = _architecture(path, config, pretrained, options)
        known = [
            t for t in (made.pad_token_id, made.eos_token_id, 0) if isinstance(t, int) and 0 <= t < made.vocab_size
        ]
        made.pad_token_id = known[0]
        if path is None or not pretrained:
            return kind.from_config(made, dtype=torch.float32)
        return kind.from_pretrained(**where(path), config=made, dtype=torch.float32)


def _architecture(path: str | None, config: Mapping[str, Any] | None, pretrained: bool, options: dict[str, Any]) -> Any:
    """Read the configuration of `path`; where no weights are loaded, `config` stands in for one that is not here."""
    auto = import_transformers().AutoConfig
    if path is not None:
        try:
            return auto.from_pretrained(**where(path), **options)
        except (OSError, ValueError):
            if config is None or pretrained:
                raise
    own = dict(config or {})
    if "model_type" not in own:
        raise ValueError("model.config names no model_type, bert or llama for instance")
    return auto.for_model(own.pop("model_type"), **own, **options)


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a name, a folder or a .gguf file; `bytes` needs none (Xue et al., 2105.13626).

    Raises:
        FileNotFoundError: when it cannot be read or downloaded.
    """
    if path == "bytes":
        return import_transformers().ByT5Tokenizer(extra_ids=0)
    with unavailable(f"dataset.tokenizer={path}"):
        return import_transformers().AutoTokenizer.from_pretrained(**where(path))


def import_transformers() -> Any:
    """Import `transformers`, silenced.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("text needs transformers, which is not installed: pip install transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Turn the many errors of a hub into one sentence.

    Raises:
        FileNotFoundError: for what cannot be read or downloaded.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
        raise FileNotFoundError(
            f"{what} can neither be read here nor downloaded ({reason}): give a name on the Hugging Face hub while "
            "online, or the path of a local folder"
        ) from error


def where(path: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a name, a folder or a .gguf file."""
    if path is None or not path.endswith(".gguf"):
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}


def _reads_both_ways(network: Any) -> bool:
    """Tell an encoder from a decoder.

    Raises:
        ValueError: for a network that does not say which it is.
    """
    causal = [bool(m.is_causal) for m in network.modules() if hasattr(m, "is_causal")]
    decodes = getattr(network.config, "is_decoder", None)
    if not causal and decodes is None:
        raise ValueError(
            f"nothing in {type(network).__name__} says whether its tokens see later ones, so it gets no mask: choose "
            "another transformer, of conf/model for instance"
        )
    return not any(causal) if causal else not decodes


def _switch_dropout_off(network: Any) -> None:
    for holder in (network.config, *network.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(holder, nn.Dropout))):
                setattr(holder, name, 0.0)


def _own_head(network: Any) -> list[str]:
    """Name the modules with parameters that a network puts on its base model."""
    return [
        name
        for name, module in network.named_children()
        if name != network.base_model_prefix and next(module.parameters(), None) is not None
    ]


def _train_only(network: Any, train: Train, own: list[str]) -> None:
    """Freeze all but biases, or all but the classifier."""
    biases = 0
    for name, parameter in network.named_parameters():
        bias = train == "bitfit" and name.endswith("bias")
        biases += bias
        parameter.requires_grad_(bias or name.partition(".")[0] in own)
    if train == "bitfit" and not biases:
        raise ValueError(f"{type(network).__name__} has no biases for model.train=bitfit: set model.train=lora")


def _with_adapters(network: Any, lora: Mapping[str, Any], own: list[str]) -> Any:
    """Add LoRA adapters; all but these and the classifier is frozen."""
    if unknown := set(lora) - {"rank", "alpha", "targets"}:
        raise ValueError(f"model.lora has no {', '.join(sorted(unknown))}: it takes rank, alpha and targets")
    targets = lora.get("targets")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("model.train=lora needs peft, which is not installed: pip install peft") from error
    wanted = "all-linear" if targets is None else list(targets)
    try:
        settings = LoraConfig(
            r=lora.get("rank", 8),
            lora_alpha=lora.get("alpha", 16),
            lora_dropout=0.0,
            target_modules=wanted,
            modules_to_save=own or None,
        )
        if targets is None and own:
            settings.exclude_modules = own
        with warnings.catch_warnings():  # of peft about transformers, which its user can do nothing about
            warnings.simplefilter("ignore")
            return get_peft_model(network, settings)
    except ValueError as error:
        raise ValueError(
            f"model.lora.targets={wanted} finds no layer ({str(error).splitlines()[0][:120]}): give ends of names such "
            f"as {_names_of_linear_layers(network)}"
        ) from error


def _names_of_linear_layers(network: nn.Module) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, nn.Linear))
    return ", ".join(list(names)[:4])
