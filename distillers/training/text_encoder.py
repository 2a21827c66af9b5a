"""A text encoder that learns together with its network: CLIP's text tower over a vocabulary of the data's own captions.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, sec. 2.4 (the tower);
Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016 (the vocabulary). A
caption set of a few hundred words needs neither CLIP's 49,408 tokens nor its 123 M parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distillers.errors import BadInput
from distillers.models.families import STABLE_DIFFUSION
from distillers.models.text import PromptEncoder

SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The [model.text] table describes the untrained text encoder of a text-to-image teacher."""

    width: int = 192  # of its hidden states
    layers: int = 3
    heads: int = 6
    length: int = 77  # tokens of a prompt, its two ends included; what exceeds them is cut off
    vocabulary: int = 1024  # tokens at most: 512 letters, two ends of a text, and parts of the captions' words

    def __post_init__(self) -> None:
        for name, least in (("width", 8), ("layers", 1), ("heads", 1), ("length", 3), ("vocabulary", 514)):
            if getattr(self, name) < least:
                raise BadInput(f"model.text.{name}", getattr(self, name), f"{least} or more")
        if self.width % self.heads:
            raise BadInput("model.text.heads", self.heads, f"a divisor of the width, {self.width}")


def untrained_encoder(captions: Sequence[str], settings: TextSettings) -> PromptEncoder:
    """Build a text encoder with random weights, of torch's global generator, and a tokenizer learnt from captions."""
    import transformers

    tokenizer = _tokenizer(captions, settings)
    start, end = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        projection_dim=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return of_parts(tokenizer, transformers.CLIPTextModel(config), learns=True)


def of_parts(tokenizer: Any, encoder: nn.Module, learns: bool = False) -> PromptEncoder:
    """Make the prompt encoder of a Stable Diffusion pipeline of these parts; `learns`: see `PromptEncoder`."""
    parts = {"tokenizer": tokenizer, "text_encoder": encoder}
    return PromptEncoder(STABLE_DIFFUSION, "StableDiffusionPipeline", parts, {}, None, learns)


def _tokenizer(captions: Sequence[str], settings: TextSettings) -> Any:
    """Learn a vocabulary from captions. Like CLIP's it holds every byte, within a word and at its end.

    What stood for an unknown letter otherwise would be the token that ends a text. The trainer is told the letters at
    word ends before: it would number them in an order of chance, by which it decides between pairs that are equally
    frequent, and a stopped training must find its own tokens again.
    """
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    learnt = transformers.CLIPTokenizer().train_new_from_iterator(
        captions, settings.vocabulary, new_special_tokens=ends, show_progress=False
    )
    merges: Any = [tuple(pair) for pair in json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]]
    known = [*letters, *ends, *map("".join, merges), *SPECIAL]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(known)}, merges=merges, model_max_length=settings.length
    )
