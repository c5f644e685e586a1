"""The networks of networks.py. Each name has a function that returns a network and its example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[tuple[Any, ...], dict[str, Any]]
BATCH = 2
CLASSES = 10

# From each module of timm 1.0.31: the network with the fewest parameters, but a usual network
# instead of timm's own test networks. Left out: transformers above 100 million parameters.
TIMM = (
    "beit_base_patch16_224", "halonet26t", "repvgg_a0", "cait_xxs24_224", "coat_tiny",
    "convit_tiny", "convmixer_768_32", "convnext_atto", "cpubone_nano", "crossvit_tiny_240",
    "csatv2", "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224",
    "densenet121", "dla34", "dpn48b", "edgenext_xx_small", "efficientformer_l1",
    "efficientformerv2_s0", "efficientnet_b0", "tf_efficientnet_lite0", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "hardcorenas_b",
    "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t",
    "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4",
    "lcnetv2_small", "levit_128", "lowformer_b0", "mambaout_femto", "maxvit_pico_rw_256",
    "poolformer_s12", "gmixer_12_224", "mobilenetv3_small_050", "mobilenetv5_base",
    "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_gap", "nasnetalarge", "nest_tiny",
    "nextvit_small", "nfnet_l0", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m",
    "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d",
    "resnet18", "resnet26t", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18",
    "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256", "swinv2_cr_tiny_224",
    "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11",
    "visformer_tiny", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224",
    "vit_relpos_small_patch16_224", "samvit_base_patch16_224", "vitamin_small_224",
    "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p",
    "xcit_nano_12_p8_224",
)  # fmt: skip
SMP = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3",
    "DeepLabV3Plus",
)  # fmt: skip
SMP_ENCODERS = ("resnet18", "mobilenet_v2")
DENSE = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t")
TRANSFORMERS = ("vit_b_16", "swin_t", "swin_v2_t")


def images(size: int, batch: int = BATCH) -> Tensor:
    """Return noise, batch x 3 x size x size."""
    return torch.randn(batch, 3, size, size)


def _timm(name: str) -> tuple[nn.Module, Example]:
    import timm

    net = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    cfg: Any = net.pretrained_cfg
    size = cfg["input_size"][-1]
    if not cfg.get("fixed_input_size") and _runs(net, 128):
        size = 128
    return net, ((images(size),), {})


def _runs(net: nn.Module, size: int) -> bool:
    """Return True if a network accepts images of this size."""
    try:
        with torch.no_grad():
            net.eval()(images(size))
    except Exception:
        return False
    return True


def _smp(architecture: str, encoder: str) -> tuple[nn.Module, Example]:
    import segmentation_models_pytorch as smp

    net = getattr(smp, architecture)(encoder, encoder_weights=None, classes=3)
    size = 128 if architecture == "PAN" else 64  # its pooling needs a larger image
    return net, ((images(size),), {})


def _hugging_face(kind: str) -> tuple[nn.Module, Example]:
    import transformers as t

    small = {"image_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    labels = torch.zeros(BATCH, dtype=torch.long)
    net: Any
    if kind == "resnet":
        net = t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=4)
        )
    elif kind == "vit":
        net = t.ViTForImageClassification(t.ViTConfig(**small, num_hidden_layers=2, patch_size=16))
    elif kind == "convnext":
        net = t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
        )
    elif kind == "mobilenet_v2":
        net = t.MobileNetV2ForImageClassification(t.MobileNetV2Config(depth_multiplier=0.35))
    elif kind == "swin":
        net = t.SwinForImageClassification(
            t.SwinConfig(
                image_size=64, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4
            )
        )
    else:
        net = t.SegformerForSemanticSegmentation(
            t.SegformerConfig(
                hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], decoder_hidden_size=32
            )
        )
        labels = torch.zeros(BATCH, 64, 64, dtype=torch.long)
    return net, ((), {"pixel_values": images(64), "labels": labels})


def _torchvision(name: str, size: int) -> tuple[nn.Module, Example]:
    import torchvision

    kwargs = {"weights_backbone": None} if name in DENSE else {}
    net = torchvision.models.get_model(name, weights=None, **kwargs)
    return net, ((images(size),), {})


def _video(name: str) -> tuple[nn.Module, Example]:
    import torchvision

    net = torchvision.models.get_model(name, weights=None)
    size = 224 if name == "s3d" else 64
    return net, ((torch.randn(BATCH, 3, 16, size, size),), {})


def _backbone(name: str) -> tuple[nn.Module, Example]:
    from torchvision.models.detection import backbone_utils

    kind = "mobilenet" if name.startswith("mobilenet") else "resnet_fpn"
    make = getattr(backbone_utils, f"{kind}_backbone")
    kwargs = {"fpn": True} if kind == "mobilenet" else {}
    return make(backbone_name=name, weights=None, **kwargs), ((images(128),), {})


def _classifiers() -> list[str]:
    """Return torchvision's convolutional classification networks."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return [x for x in names if not x.startswith(("vit", "swin", "maxvit"))]


def _catalogue() -> dict[str, Callable[[], tuple[nn.Module, Example]]]:
    made: dict[str, Any] = {f"timm/{name}": lambda n=name: _timm(n) for name in TIMM}
    for architecture in SMP:
        for encoder in SMP_ENCODERS:
            made[f"smp/{architecture}-{encoder}"] = lambda a=architecture, e=encoder: _smp(a, e)
    for kind in ("resnet", "vit", "convnext", "mobilenet_v2", "segformer", "swin"):
        made[f"transformers/{kind}"] = lambda k=kind: _hugging_face(k)
    for name in TRANSFORMERS:
        made[f"torchvision/{name}"] = lambda n=name: _torchvision(n, 224)
    for name in DENSE:
        made[f"torchvision/{name}"] = lambda n=name: _torchvision(n, 128)
    for name in VIDEO:
        made[f"torchvision/{name}"] = lambda n=name: _video(n)
    for name in ("resnet18", "mobilenet_v3_large"):
        made[f"torchvision/fpn-{name}"] = lambda n=name: _backbone(n)
    for name in _classifiers():
        size = 299 if name == "inception_v3" else 128
        made[f"torchvision/{name}"] = lambda n=name, s=size: _torchvision(n, s)
    return made


CATALOGUE = _catalogue()
