"""Pipelines of diffusers' own classes with random weights, one for each family of text to image, as small as can be.

`build(NAME, FOLDER)` saves one as FOLDER and returns it. Everything that a family's network is told differs from its
default, so that what is told wrongly shows in a picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from untrained_pipelines import BETAS, tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}


def clip(kind: type[Any], **more: Any) -> Any:
    """A text encoder of CLIP's classes."""
    config = transformers.CLIPTextConfig(
        vocab_size=54, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=20, projection_dim=32, **TOKENS, **{"hidden_size": 32, **more},
    )  # fmt: skip
    return kind(config).eval()


def t5() -> Any:
    """A text encoder of T5's class."""
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config).eval()


def t5_words() -> Any:
    """T5's tokenizer, that knows letters only."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def gemma() -> Any:
    """A text encoder of Gemma's class."""
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2Model(config).eval()


def gemma_words() -> Any:
    """Gemma's tokenizer, that knows letters only."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def vae(channels: int, **more: Any) -> Any:
    """An autoencoder of factor 2."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    ).eval()  # fmt: skip


def unet(**more: Any) -> Any:
    """A U-Net that is told words."""
    return diffusers.UNet2DConditionModel(
        **{"cross_attention_dim": 32, **more}, sample_size=8,
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def ddim(prediction: str = "v_prediction") -> Any:
    """The scheduler whose steps are ours."""
    return diffusers.DDIMScheduler(
        **BETAS, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing", steps_offset=1
    )


def sd(folder: Path, prediction: str = "v_prediction") -> Any:
    """Stable Diffusion 1 (which predicts noise) or 2."""
    return diffusers.StableDiffusionPipeline(
        unet=unet(), vae=vae(4), tokenizer=tokenizer(folder, 20), text_encoder=clip(transformers.CLIPTextModel),
        safety_checker=None, feature_extractor=None, scheduler=ddim(prediction), requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder: Path, **more: Any) -> Any:
    """SDXL."""
    words = tokenizer(folder, 20)
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=96, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8, **more,
        ),
        vae=vae(4, scaling_factor=0.13), tokenizer=words, tokenizer_2=words,
        text_encoder=clip(transformers.CLIPTextModel, hidden_act="quick_gelu"), scheduler=ddim(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, hidden_act="gelu", hidden_size=64),
        add_watermarker=False,
    )  # fmt: skip


def lcm(folder: Path) -> Any:
    """A latent consistency model: Stable Diffusion whose network is told the guidance scale."""
    return diffusers.LatentConsistencyModelPipeline(
        unet=unet(time_cond_proj_dim=16), vae=vae(4), tokenizer=tokenizer(folder, 20),
        text_encoder=clip(transformers.CLIPTextModel), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.LCMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False),
        requires_safety_checker=False,
    )  # fmt: skip


def sd3(folder: Path, with_t5: bool = True, **scheduler: Any) -> Any:
    """Stable Diffusion 3."""
    words = tokenizer(folder, 20)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=4,
            pos_embed_max_size=36,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(4, shift_factor=0.3, scaling_factor=1.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(transformers.CLIPTextModelWithProjection), tokenizer=words,
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, hidden_act="gelu"), tokenizer_2=words,
        text_encoder_3=None if not with_t5 else wide_t5(), tokenizer_3=t5_words() if with_t5 else None,
    )  # fmt: skip


def wide_t5() -> Any:
    """T5 as wide as both of CLIP's encoders."""
    config = transformers.T5Config(vocab_size=40, d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config).eval()


def flux(folder: Path, guided: bool = True, **scheduler: Any) -> Any:
    """FLUX.1, as dev or as schnell."""
    usual = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
            guidance_embeds=guided,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{**usual, **scheduler}),
        vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(transformers.CLIPTextModel), tokenizer=tokenizer(folder, 20),
        text_encoder_2=t5(), tokenizer_2=t5_words(),
    )  # fmt: skip


def pixart(folder: Path, sigma: bool = False) -> Any:
    """PixArt-Alpha with the size among what it is told, or PixArt-Sigma."""
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    return kind(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8 if sigma else 128, patch_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=3,
            in_channels=4, out_channels=8, caption_channels=32, cross_attention_dim=24, norm_type="ada_norm_single",
            use_additional_conditions=False if sigma else None, num_embeds_ada_norm=1000, attention_bias=True,
        ).eval(),
        scheduler=ddim(), vae=vae(4), text_encoder=t5(), tokenizer=t5_words(),
    )  # fmt: skip


def sana(folder: Path, scheduler: Any = None) -> Any:
    """Sana."""
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
            sample_size=8, timestep_scale=0.5,
        ).eval(),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types="ResBlock",  # at random, linear attention divides by almost nothing
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
            decoder_act_fns="silu", scaling_factor=0.9,
        ).eval(),
        text_encoder=gemma(), tokenizer=gemma_words(),
    )  # fmt: skip


def dpm_of_flow() -> Any:
    """Sana's own scheduler, of first order. It tells whole times; those of 1, 2, 4 steps are whole on this clock."""
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, num_train_timesteps=1025
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd": sd,
    "sd of noise": lambda folder: sd(folder, "epsilon"),
    "sdxl": sdxl,
    "lcm": lcm,
    "lcm sdxl": lambda folder: sdxl(folder, time_cond_proj_dim=16),
    "sd3": sd3,
    "sd3 without t5": lambda folder: sd3(folder, with_t5=False, use_dynamic_shifting=True, base_image_seq_len=4),
    "flux": flux,
    "flux schnell": lambda folder: flux(folder, guided=False, use_dynamic_shifting=False, shift=1.0),
    "pixart": pixart,
    "pixart sigma": lambda folder: pixart(folder, sigma=True),
    "sana": sana,
    "sana by dpm": lambda folder: sana(folder, dpm_of_flow()),
}


def build(name: str, folder: Path) -> Any:
    """Build a pipeline and save it."""
    torch.manual_seed(0)
    made = PIPELINES[name](folder.with_name(f"{folder.name}-words"))
    with torch.no_grad():  # transformers for pictures start at zero: an untrained one would answer whatever it is told
        for key, parameter in getattr(made, "transformer", torch.nn.Module()).named_parameters():
            if parameter.abs().max() == 0 and key.endswith("weight"):
                parameter.normal_(0, 0.1)
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made
