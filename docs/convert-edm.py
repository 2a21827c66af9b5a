"""Turn a public EDM pickle (github.com/NVlabs/edm) into a folder that diffusers and Fewstep open.

    python docs/convert-edm.py edm-imagenet-64x64-cond-adm.pkl imagenet-64

A pickle runs whatever code its author put into it, so this is a step of its own, for a container without network and
without anything that matters: docs/teachers.md has the command. Fewstep itself never unpickles. Only safetensors and
JSON leave the container.

It needs torch and diffusers, and NVlabs' repository on PYTHONPATH, whose `torch_utils` and `dnnlib` the pickle asks
for. The network must be the ADM U-Net (`DhariwalUNet`) under `EDMPrecond`, as those of ImageNet at 64 pixels are:
diffusers' UNet2DModel has exactly its layers. The networks of CIFAR-10, FFHQ and AFHQ (`SongUNet`) scale each residual
sum by sqrt(1/2), convolve the skips of their resampling and add the class before the time's layers. No network of
diffusers does, and they are refused. The converted network is compared with the original before anything is written.
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, EDMEulerScheduler, UNet2DModel
from torch import Tensor

TOLERANCE = 1e-3  # of the output, whose standard deviation is about 1


def configuration(net: Any) -> dict[str, Any]:
    """Describe an `EDMPrecond` over a `DhariwalUNet` as options of UNet2DModel."""
    model = net.model
    kinds = type(net).__name__, type(model).__name__
    if kinds != ("EDMPrecond", "DhariwalUNet"):
        raise SystemExit(f"{kinds[0]} over {kinds[1]}: only EDMPrecond over DhariwalUNet is a network of diffusers")
    sides = sorted({int(name.split("x")[0]) for name in model.enc}, reverse=True)
    blocks = {
        side: [model.enc[name] for name in model.enc if name.startswith(f"{side}x{side}_block")] for side in sides
    }
    attends = [bool(blocks[side][0].num_heads) for side in sides]
    every = [*model.enc.values(), *model.dec.values()]
    heads = {one.out_channels // one.num_heads for one in every if getattr(one, "num_heads", 0)}
    groups = {one.num_groups for one in model.modules() if hasattr(one, "num_groups")}
    if len(heads) != 1 or len(groups) != 1:
        given = f"heads of {sorted(heads)} channels, norms of {sorted(groups)} groups"
        raise SystemExit(f"{given}: UNet2DModel has one width of heads and one number of groups")
    first = blocks[sides[0]][0].out_channels
    if model.map_layer0.weight.shape != (4 * first, first):
        given = tuple(model.map_layer0.weight.shape)
        raise SystemExit(f"times become {given} numbers: in UNet2DModel they become {(4 * first, first)}")
    return {
        "sample_size": net.img_resolution,
        "in_channels": net.img_channels,
        "out_channels": net.img_channels,
        "block_out_channels": [blocks[side][0].out_channels for side in sides],
        "layers_per_block": len(blocks[sides[0]]),
        "down_block_types": ["AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": heads.pop(),
        "norm_num_groups": model.out_norm.num_groups,
        "attn_norm_num_groups": model.out_norm.num_groups,
        "norm_eps": model.out_norm.eps,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": net.label_dim or None,
    }  # fmt: skip


def weights(model: Any, levels: int) -> dict[str, Tensor]:
    """Rename the weights of a `DhariwalUNet`; queries, keys and values lie in turn there."""
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    made: dict[str, Tensor] = {}

    def copy(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                made[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]

    def block(theirs: str, resnet: str, attention: str = "") -> None:
        parts = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
        for one, other in {**parts, "skip": "conv_shortcut"}.items():
            copy(f"{theirs}.{one}", f"{resnet}.{other}")
        if f"{theirs}.qkv.weight" not in state:
            return
        copy(f"{theirs}.norm2", f"{attention}.group_norm")
        made[f"{attention}.to_out.0.weight"] = state[f"{theirs}.proj.weight"][:, :, 0, 0]
        made[f"{attention}.to_out.0.bias"] = state[f"{theirs}.proj.bias"]
        for i, name in enumerate(("to_q", "to_k", "to_v")):
            made[f"{attention}.{name}.weight"] = state[f"{theirs}.qkv.weight"][i::3, :, 0, 0]
            made[f"{attention}.{name}.bias"] = state[f"{theirs}.qkv.bias"][i::3]

    copy("map_layer0", "time_embedding.linear_1")
    copy("map_layer1", "time_embedding.linear_2")
    if "map_label.weight" in state:
        made["class_embedding.weight"] = state["map_label.weight"].T
    sides = sorted({int(name.split("x")[0]) for name in model.enc}, reverse=True)
    copy(f"enc.{sides[0]}x{sides[0]}_conv", "conv_in")
    for level, side in enumerate(sides):
        for name in (name for name in model.enc if name.startswith(f"{side}x{side}_block")):
            i = name.rpartition("block")[2]
            block(f"enc.{name}", f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}")
        if level:
            block(f"enc.{side}x{side}_down", f"down_blocks.{level - 1}.downsamplers.0")
            block(f"dec.{sides[level - 1]}x{sides[level - 1]}_up", f"up_blocks.{levels - 1 - level}.upsamplers.0")
        up = levels - 1 - level
        for name in (name for name in model.dec if name.startswith(f"{side}x{side}_block")):
            i = name.rpartition("block")[2]
            block(f"dec.{name}", f"up_blocks.{up}.resnets.{i}", f"up_blocks.{up}.attentions.{i}")
    block(f"dec.{sides[-1]}x{sides[-1]}_in0", "mid_block.resnets.0", "mid_block.attentions.0")
    block(f"dec.{sides[-1]}x{sides[-1]}_in1", "mid_block.resnets.1")
    copy("out_norm", "conv_norm_out")
    copy("out_conv", "conv_out")
    return made


@torch.no_grad()
def difference(net: Any, unet: Any) -> float:
    """Measure the largest difference of the two networks' outputs, at noises from one end to the other."""
    torch.manual_seed(0)
    found = []
    for sigma in (0.002, 0.1, 1.0, 10.0, 80.0):
        x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
        time = torch.full((2,), sigma).log() / 4
        label = torch.tensor([0, max(net.label_dim - 1, 0)])
        given = torch.eye(net.label_dim)[label] if net.label_dim else None
        theirs = net.model(x, time, class_labels=given)
        ours = unet(x, time, class_labels=label if net.label_dim else None).sample
        found.append(float((ours - theirs).abs().max()))
    return max(found)


def convert(net: Any, out: Path) -> float:
    """Write the network as a pipeline, and return how far its output is from the original's."""
    net = net.eval().float()
    options = configuration(net)
    unet: Any = UNet2DModel(**options).eval()
    unet.load_state_dict(weights(net.model, len(options["block_out_channels"])))
    off = difference(net, unet)
    if not off <= TOLERANCE:
        raise SystemExit(f"the converted network differs by {off:g} from the original: nothing is written")
    DDPMPipeline(unet, EDMEulerScheduler(sigma_data=float(net.sigma_data))).save_pretrained(out)  # type: ignore[arg-type]
    return off


def main() -> None:
    """Convert the pickle that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pickle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels", type=Path, help="a JSON list of the classes' names, by number")
    given = parser.parse_args()
    with given.pickle.open("rb") as file:
        net = pickle.load(file)["ema"]  # runs the code of the pickle
    off = convert(net, given.out)
    if given.labels:
        index = json.loads((given.out / "model_index.json").read_text())
        index["id2label"] = dict(enumerate(json.loads(given.labels.read_text())))
        (given.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{given.out}: outputs differ by {off:.1e} at most")


if __name__ == "__main__":
    main()
