"""How often a run's captions of the clips of `flm data demo DIR --clips` name the right motion, and the right colour and shape.

    python -m tools.motion_words RUN [--split test]
"""

from pathlib import Path
from typing import Annotated

import tyro

from flm_scale.data.motions import MOTIONS
from flm_scale.evals.caption import batches_of, read_pixels, words, write_captions
from flm_scale.evals.run import open_run
from flm_scale.parallel.processes import start_processes


def main(run_dir: Annotated[Path, tyro.conf.Positional], split: str = "test") -> None:
    """Print the shares over the clips of a split, and by motion.

    Args:
        run_dir: of a run that was trained on the clips, or on their middle frames.
        split: of its dataset.
    """
    trained = open_run(run_dir)
    run, index, model = trained.run, trained.dataset.index(split), trained.model(start_processes(trained.run.parallel))
    motions, things = {motion: list[bool]() for motion in MOTIONS}, list[bool]()
    for clips in batches_of(range(len(index))):
        pixels = read_pixels(run, index, clips)
        captions = write_captions(run, model, pixels, tokenizer=trained.tokenizer, objective=trained.objective, beams=1)
        for clip, caption in zip(clips, captions, strict=True):
            truth, said = words(index.captions[clip][0]), f" {words(caption.text)} "
            motion = next(motion for motion in MOTIONS if truth.endswith(motion))
            motions[motion].append(f" {motion} " in said)
            things.append(f" {truth.removesuffix(motion).strip()} " in said)
    every = [is_right for of_motion in motions.values() for is_right in of_motion]
    print(f"{run_dir}, split {split}, {len(every)} clips: motion {100 * sum(every) / len(every):.1f} %, "
          f"colour and shape {100 * sum(things) / len(things):.1f} %")
    for motion, found in motions.items():
        print(f"  {motion:20}{100 * sum(found) / max(1, len(found)):5.1f} % of {len(found)}")


if __name__ == "__main__":
    tyro.cli(main)
