"""Stable Diffusion 1.5 and SDXL as they are built, with random weights: for measuring speed where no hub is reachable.

    python tests/untrained_pipelines.py sd15 FOLDER        then: fewstep adopt FOLDER weights/sd15 --steps 1

The published configurations (runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0). A letter is a
token: the vocabulary is not built, and costs nothing to be told.
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip


def tokenizer(folder: Path, length: int = 77) -> Any:
    """CLIP's, that knows letters only."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(known)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def clip(kind: Any, options: dict[str, Any]) -> Any:
    """A text encoder."""
    tokens = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    return kind(transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **options, **tokens))


def build(name: str, folder: Path) -> None:
    """Saves the pipeline at float16."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = diffusers.UNet2DConditionModel(**UNETS[name])
        vae = diffusers.AutoencoderKL(**VAE, sample_size=512, scaling_factor=0.18215 if name == "sd15" else 0.13025)
        encoders = [clip(transformers.CLIPTextModel, CLIP_L)]
        if name == "sdxl":
            encoders.append(clip(transformers.CLIPTextModelWithProjection, CLIP_G))
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )  # v instead of eps: at random, eps over a small alpha is a picture of rounding errors
    parts = {"unet": unet.half(), "vae": vae.half(), "scheduler": scheduler, "feature_extractor": None}
    words = tokenizer(folder / "words")
    parts |= {"tokenizer": words, "text_encoder": encoders[0].half()}
    if name == "sdxl":
        parts |= {"tokenizer_2": words, "text_encoder_2": encoders[1].half()}
        made: Any = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        made = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    made.save_pretrained(folder)
    print(folder, *(f"{n} {sum(p.numel() for p in m.parameters()) / 1e6:.0f} M" for n, m in made.components.items()
                    if isinstance(m, torch.nn.Module)), sep=", ")  # fmt: skip


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
