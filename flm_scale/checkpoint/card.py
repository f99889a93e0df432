"""The model card of an exported folder: its README.md."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.store import MANIFEST, folders_of
from flm_scale.config import Run, TextConfig
from flm_scale.data.shards import Dataset

CARD = """---
library_name: transformers
pipeline_tag: image-to-text
license: unknown
tags: [flm_scale, {objective}]
---

# {name}

A vision-language model of {millions:,.1f} million weights, pretrained with flm_scale: recipe `{name}`, objective `{objective}`,
{steps} of {all_steps} steps.
Vision: {vision}, {image_size} x {image_size} pixels.
Text: {text}.

Data: {dataset}, `{root}`.{sources}

## Use

Needs torch, transformers and open_clip (`pip install torch transformers open_clip_torch`).

```python
{script}```
{more}
`flm eval {folder} --task caption|retrieval|vqa` and `flm caption {folder} picture.png` open this folder too. `run.json` has every value of the run.

## Scores

{scores}

## Licence

Not stated. It depends on the data and on the pretrained weights, if any; put it here and in the head of this file before you publish.
"""
CAPTION_SCRIPT = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
said = model.generate(**processor(Image.open("picture.png")))
print(tokenizer.decode(said[0], skip_special_tokens=True))
"""
MLM_SCRIPT = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("a picture", return_tensors="pt")
ids["input_ids"][0, 1] = tokenizer.mask_token_id
print(tokenizer.decode(model(**ids, **processor(Image.open("picture.png"))).logits[0, 1].argmax()))
"""
BRIDGE_SCRIPT = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # where this file is
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # language_model="..." where that is in another folder
tokenizer = AutoTokenizer.from_pretrained(model.config.language_model)
said = model.generate(**processor(Image.open("picture.png")))
print(tokenizer.decode(said[0], skip_special_tokens=True))
"""
RECONSTRUCT = """
`model.reconstruct(pixel_values, input_ids, spans)` gives the logits of tokens that are hidden in any span, from what is left and right of it.
"""


def model_card(run_dir: Path, run: Run, checkpoint: Checkpoint, dataset: Dataset, *, out: Path) -> str:
    """Return the text. Scores are those in RUN/evals of this very checkpoint. out: what the folder will be called."""
    vision, sources = run.vision, dataset.manifest.sources
    script = {"mlm": MLM_SCRIPT, "captioning": BRIDGE_SCRIPT}.get(run.objective.kind, CAPTION_SCRIPT)
    return CARD.format(
        name=run.name, objective=run.objective.kind, millions=sum(map(prod, checkpoint.names().values())) / 1e6, steps=checkpoint.step,
        all_steps=run.steps, vision=f"a ViT of {vision.layers} layers, width {vision.width}" if vision.kind == "vit" else vision.name,
        image_size=vision.image_size, text=text_words(run), dataset=dataset.manifest.name, root=dataset.manifest.root,
        folder=out.name, script=script.format(folder=out.name),
        sources="".join(f" {source.package} {source.version} ({source.license})." for source in sources),
        more=RECONSTRUCT if run.objective.kind == "flm" else "", scores="\n".join(score_lines(run_dir, checkpoint)) or "None yet.")


def text_words(run: Run) -> str:
    """Return what the card says of the text side."""
    text = run.text
    if isinstance(text, TextConfig):
        return f"width {text.width}, {text.bottom_layers} layers that read text alone, {text.fusion_layers} that look at the picture"
    return (f"a bridge of {text.bridge.layers} layers into {text.name}, which never changes and is not in this folder: it is opened by that name, "
            f"and must have the sha256 {text.weights_hash}")


def score_lines(run_dir: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line a task. `flm eval` scores the newest checkpoint, so a file counts when that is this one and the file is younger."""
    saved = (checkpoint.folder / MANIFEST).stat().st_mtime
    is_newest = folders_of(run_dir)[0] == checkpoint.folder
    for path in sorted((run_dir / "evals").glob("*.json")):
        if is_newest and path.stat().st_mtime > saved:
            result = json.loads(path.read_text())
            yield f"- {result['task']}, split {result['split']}: {'; '.join(score_words(result))}"


def score_words(result: dict[str, Any]) -> Iterator[str]:
    """Yield what a file of evals/ says, table row by table row, times 100 as `flm eval` prints it."""
    rows = {row["start"]: row for row in result["rows"]} if "rows" in result else result
    for name, row in rows.items():
        scores = row.items() if isinstance(row, dict) and name != "chance" else ()
        words = [f"{score} {100 * value:.1f}" for score, value in scores if isinstance(value, float) and score != "seconds"]
        if words:
            yield f"{name} {', '.join(words)}"
