"""Download Google's MobileNetV1 for ImageNet from the Hugging Face hub, and write it for `--model tf_mobilenetv1`."""

import argparse

import safetensors.torch
import torch
from transformers import MobileNetV1ForImageClassification

from str_triton.cnn.data.encoded import IMAGENET
from str_triton.cnn.models import build

# The mean and deviation that the training programs standardise pixels from 0 to 255 with.
MEAN, STD = torch.tensor(IMAGENET.mean), torch.tensor(IMAGENET.std)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("out", metavar="WEIGHTS", help="the file to write, such as mobilenetv1.safetensors")
parser.add_argument("--source", default="google/mobilenet_v1_1.0_224", help="a name on the hub, or a folder")
options = parser.parse_args()

published = MobileNetV1ForImageClassification.from_pretrained(options.source)
network = build("tf_mobilenetv1")
# Both networks have the same layers in the same order, under other names.
weights = dict(zip(network.state_dict(), published.state_dict().values(), strict=True))
# The first of Google's 1001 classes is the background.
weights |= {key: weights[key][-1000:].clone() for key in ("fc.weight", "fc.bias")}
# Google's network takes pixels from -1 to 1, p / 127.5 - 1. Ours takes x = (p - MEAN) / STD. The first layer makes
# p / 127.5 - 1 = x STD / 127.5 + (MEAN / 127.5 - 1) of it; batch norm's mean takes the constant.
first = weights["model.0.0.weight"]
weights["model.0.0.weight"] = first * (STD / 127.5)[:, None, None]
constant = (first.sum((2, 3)) * (MEAN / 127.5 - 1)).sum(1)
weights["model.0.1.running_mean"] = weights["model.0.1.running_mean"] - constant

network.load_state_dict(weights)
safetensors.torch.save_file(weights, options.out)
print(f"wrote {options.out}: {sum(tensor.numel() for tensor in weights.values()):,} numbers")
