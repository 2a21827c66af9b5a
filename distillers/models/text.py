"""The prompt encoders of diffusers' text-to-image pipelines, each by the pipeline's own `encode_prompt`."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distillers.models.families import Family

# what pipelines hand from their own call to `encode_prompt`, at their own defaults
CHOICES = ("max_sequence_length", "clean_caption", "complex_human_instruction")


class Rows(nn.Module):
    """A text encoder as a network of tensors: tokens in, one row for each prompt out; so it runs as every other does.

    A row holds the last hidden states and, of CLIP, those of the layer before and the pooled vector.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = encoder.config
        self.clip = type(encoder).__name__.startswith("CLIP")

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        """Encode tokens, int64 (B, length), to `.sample` (B, length * width, or twice that and the pooled width)."""
        found: Any = self.encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=self.clip)
        parts = [found.last_hidden_state.flatten(1)]
        if self.clip:
            pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
            parts += [found.hidden_states[-2].flatten(1), pooled]
        return SimpleNamespace(sample=torch.cat(parts, 1))


class Tower(nn.Module):
    """A text encoder that answers to a stock pipeline as transformers' own class does, and runs by its `rows`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.rows: nn.Module = Rows(encoder.eval().requires_grad_(False))
        self.encoder: Any = encoder
        self.config: Any = encoder.config

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, to which pipelines cast what they encode."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """Encode tokens, int64 (B, length); the answer is transformers', of those layers that pipelines read."""
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        rows: Tensor = self.rows(input_ids, *(() if attention_mask is None else (attention_mask,))).sample
        length = input_ids.shape[1]
        states = length * self.config.hidden_size
        last = rows[:, :states].unflatten(1, (length, -1))
        if not type(self.encoder).__name__.startswith("CLIP"):
            return BaseModelOutput(last_hidden_state=last)
        before, pooled = rows[:, states : 2 * states].unflatten(1, (length, -1)), rows[:, 2 * states :]
        both: Any = (before, last)
        if type(self.encoder).__name__ == "CLIPTextModelWithProjection":
            return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=last, hidden_states=both)
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=both)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning, inside the block, that readers of pictures miss torchvision: none is used."""
    logger = logging.getLogger("transformers.utils.import_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class PromptEncoder(nn.Module):
    """An encoder of prompts to the tensors that a family's network takes, by the stock pipeline's own `encode_prompt`.

    Args:
        family: of the network; one with words.
        pipeline: the class of the stock pipeline.
        parts: its tokenizers and text encoders, by their names in the pipeline.
        options: model_index.json, for the pipeline's other options.
        network: the configuration of the network, where `encode_prompt` reads it.
        learns: whether the one encoder is being trained together with the network, which then takes `tokens`.
    """

    def __init__(
        self,
        family: Family,
        pipeline: str,
        parts: Mapping[str, Any],
        options: Mapping[str, Any],
        network: Any,
        learns: bool = False,
    ) -> None:
        import diffusers
        from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

        super().__init__()
        assert family.words is not None
        self.family, self.words, self.learns = family, family.words, learns
        self.towers = nn.ModuleDict({name: Tower(one) for name, one in parts.items() if isinstance(one, nn.Module)})
        for name, tower in self.towers.items():  # some tokenizers' files do not say how much their encoder reads
            length = getattr(tower.config, "max_position_embeddings", None)
            tokenizer = parts[name.replace("text_encoder", "tokenizer")]
            if self.clip(name) and length:
                tokenizer.model_max_length = min(tokenizer.model_max_length, length)
        with _quiet():
            kind = getattr(diffusers, pipeline)
        taken = list(inspect.signature(kind.__init__).parameters.values())[1:]
        given: dict[str, Any] = {one.name: None for one in taken if one.default is inspect.Parameter.empty}
        given |= {one.name: options[one.name] for one in taken if type(options.get(one.name)) is bool}
        given |= {"requires_safety_checker": False} if "safety_checker" in given else {}  # it is no encoder
        given |= {**parts, **{name: tower for name, tower in self.towers.items()}}
        self.pipeline: Any = kind(**given)
        setattr(self.pipeline, family.part, SimpleNamespace(config=network, dtype=torch.float32))
        self.options = {k: v for k, v in self.pipeline.config.items() if not k.startswith("_") and type(v) is bool}
        self._optional = [one.name for one in taken if one.name in self.pipeline.components]
        self.zeros_for_empty = bool(self.pipeline.config.get("force_zeros_for_empty_prompt", False))
        called, asked = (inspect.signature(f).parameters for f in (kind.__call__, kind.encode_prompt))
        self.arguments = {k: called[k].default for k in CHOICES if k in called and k in asked}
        if "clean_caption" in self.arguments:  # asked for in vain, it warns at every prompt
            self.arguments["clean_caption"] &= is_bs4_available() and is_ftfy_available()
        self.arguments |= self.words.arguments

    def clip(self, name: str) -> bool:
        """Tell whether an encoder is CLIP's."""
        return self.words.encoders[name].startswith("CLIP")

    @property
    def index(self) -> dict[str, Any]:
        """What model_index.json says of the encoders, the tokenizers, the options, and of parts that are not there."""
        named = {**self.encoders, **self.tokenizers}
        entries = {name: ["transformers", type(part).__name__] for name, part in named.items()}
        return {**{name: [None, None] for name in self._optional}, **entries, **self.options}

    @property
    def guides(self) -> bool:
        """Tell whether guidance takes a pass without the prompt, so that there is a side for a negative one."""
        return self.family.guided_by == "two passes" and "null_text" in self.words.returns

    @property
    def encoders(self) -> dict[str, Any]:
        """The text encoders as they were loaded, by their names in the pipeline."""
        return {name: tower.encoder for name, tower in self.towers.items()}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers, by their names in the pipeline."""
        names = (name.replace("text_encoder", "tokenizer") for name in self.towers)
        return {name: getattr(self.pipeline, name) for name in names}

    @property
    def width(self) -> int | None:
        """How wide "text" is; None where the encoders do not say, for the one that does is left out."""
        towers: Any = self.towers
        return sum(int(towers[name].config.hidden_size) for name in self.words.states if name in towers) or None

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Split B prompts into tokens, int64 (B, length), for the one encoder, cut or padded to what it takes."""
        (tokenizer,) = self.tokenizers.values()
        ids: Tensor = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids

    @torch.no_grad()
    def forward(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        negatives: Sequence[str | None] | None = None,
        guided: bool = False,
    ) -> dict[str, Tensor]:
        """Encode B prompts for pictures of `size` (H, W) in pixels, on the encoders' device.

        Args:
            negatives: what guidance leads away from, one per prompt; None for the pipeline's own: zeros or no words.
            guided: whether the side of guidance without the prompt is wanted, behind "null_".

        Returns:
            "text" (B, length, width) and, as the family has them, "pooled" (B, P), "mask" (B, length), "ids" (B, K).
        """
        device = next(self.parameters()).device
        given: dict[str, Any] = {"prompt": list(prompts), "device": device, "num_images_per_prompt": 1}
        guided = guided and self.guides
        if "null_text" in self.words.returns:
            given["do_classifier_free_guidance"] = guided
        if guided and negatives is not None and any(negative is not None for negative in negatives):
            given["negative_prompt"] = [negative or "" for negative in negatives]
        found = self.pipeline.encode_prompt(**given, **self.arguments)
        named = dict(zip(self.words.returns, found, strict=True))
        told = {k: v if k.endswith("mask") else v.float() for k, v in named.items() if k and v is not None}
        told = {k: v for k, v in told.items() if guided or not k.startswith("null_")}
        if "negative_prompt" in given and self.zeros_for_empty:
            omitted = torch.tensor([negative is None for negative in negatives or ()], device=device)
            for name in (name for name in told if name.startswith("null_")):
                told[name] = told[name].masked_fill(omitted.reshape(-1, *[1] * (told[name].ndim - 1)), 0)
        if self.words.ids is not None:
            told["ids"] = torch.tensor([self.words.ids(*size)] * len(prompts), dtype=torch.float32, device=device)
        return told

    @cached_property
    def _counting(self) -> dict[str, tuple[Any, int]]:
        """Tokenizers that cut nothing and pad nothing, by the encoder's name, and how many tokens that reads.

        They are copies: another thread may tokenize meanwhile, and a tokenizer's own settings are no thread's own.
        """
        found = dict[str, tuple[Any, int]]()
        for name in self.towers:
            tokenizer = copy.deepcopy(self.tokenizers[name.replace("text_encoder", "tokenizer")])
            length = None if self.clip(name) else self.arguments.get("max_sequence_length")
            found[name] = tokenizer, int(tokenizer.model_max_length if length is None else length)
        return found

    def unread(self, prompt: str) -> dict[str, str]:
        """Tell which end of a prompt each encoder does not read, by its name in the pipeline; {} where all is read."""
        found = dict[str, str]()
        for name, (tokenizer, length) in self._counting.items():
            tokens = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
            if len(tokens.input_ids) > length:  # the last token that is read is the one that ends a text
                left = tokens.input_ids[length - 1 :]
                begins = tokens.offset_mapping[length - 1][0] if tokenizer.is_fast else None
                found[name] = tokenizer.decode(left, skip_special_tokens=True) if begins is None else prompt[begins:]
        return found
