"""The accuracy that TensorFlow's weights of MobileNetV1 gain by ReLU6, "SAME" padding and the epsilon.

    python -m benchmarks.studies.tf_arithmetic --data hub:DIR --pretrained FILE

Tests Google's weights for ImageNet, without any training, on the test photographs of Caltech-101 whose classes are also
classes of ImageNet, at 128x128 pixels, with each part of the arithmetic exchanged. Writes tf_arithmetic.json.
"""

import argparse
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import write
from str_triton.cnn.data import batches, load
from str_triton.cnn.mobilenet import SamePadding
from str_triton.cnn.rebuild import rebuild

# Caltech-101's classes with the number of the same class of ImageNet.
PAIRS = """
Leopards:288 accordion:401 airplanes:404 ant:310 barrel:427 beaver:337 binocular:447 cannon:471 cellphone:487
cougar_body:286 cougar_face:286 crayfish:124 crocodile:49 dalmatian:251 dragonfly:319 electric_guitar:546
flamingo:130 grand_piano:579 hedgehog:334 laptop:620 llama:355 lobster:122 nautilus:117 panda:388 pizza:963
platypus:103 revolver:763 rooster:7 saxophone:776 schooner:780 scorpion:71 soccer_ball:805 starfish:327
strawberry:949 tick:78 trilobite:69 umbrella:879
"""
CLASSES = {name: int(number) for name, number in (pair.split(":") for pair in PAIRS.split())}
VARIANTS = {
    "ReLU6, SAME, 1e-3 (`tf_mobilenetv1`)": ("relu6", "same", 1e-3),
    "ReLU6, SAME, 1e-5": ("relu6", "same", 1e-5),
    "ReLU6, symmetric, 1e-3": ("relu6", "symmetric", 1e-3),
    "ReLU, SAME, 1e-3": ("relu", "same", 1e-3),
    "ReLU, symmetric, 1e-5 (`mobilenetv1`)": ("relu", "symmetric", 1e-5),
}


def changed(model: nn.Module, activation: str, padding: str, epsilon: float) -> nn.Module:
    """Change the arithmetic of a `tf_mobilenetv1`, in place, and return it."""
    for stage in model.model:
        for name, module in stage.named_children():
            if isinstance(module, nn.ReLU6) and activation == "relu":
                setattr(stage, name, nn.ReLU())
            elif isinstance(module, SamePadding) and padding == "symmetric":
                module.forward = partial(F.pad, pad=(1, 1, 1, 1))
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = epsilon
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="hub:DIR of Caltech-101")
    parser.add_argument("--pretrained", required=True, help="the weights of tf_mobilenetv1 for ImageNet")
    options = parser.parse_args()
    data = load(options.data, image_size=128)
    numbers = torch.tensor([CLASSES.get(name, -1) for name in data.class_names])
    models = {
        name: changed(rebuild(options.pretrained, "tf_mobilenetv1").model, *how) for name, how in VARIANTS.items()
    }
    hits, images = {name: torch.zeros(2, dtype=torch.int64) for name in models}, 0
    stream = batches(data.test, batch_size=32, seed=0, epoch=0, augment=False, shuffle=False, workers=0)
    for pixels, labels in stream:
        known = numbers[labels] >= 0
        wanted = numbers[labels[known]][:, None]
        images += len(wanted)
        for name, model in models.items():
            if len(wanted):
                right = model(pixels[known]).topk(5).indices == wanted
                hits[name] += torch.stack([right[:, 0].sum(), right.sum()])
    rows = {name: dict(zip(("top1", "top5"), (found / images).tolist(), strict=True)) for name, found in hits.items()}
    write("tf_arithmetic", {"images": images, "classes": len(CLASSES), "variants": rows})


if __name__ == "__main__":
    main()
