"""The pictures of a run's evaluations as files, to be compared by people."""

from pathlib import Path

from ddpo.validation import UserError
from rewards.preferences.pictures import METADATA, Picture, read_pictures, write_metadata
from trainers.config.io import load_config
from trainers.evaluation.evaluator import Evaluation, chosen_prompts
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.ledger import replaced
from trainers.run_folder.prompt_record import check_evaluated
from trainers.run_folder.python_runs import evaluation_source
from trainers.tracking.pictures import to_pil


def pictures_of(source: Path) -> list[Picture]:
    """The pictures of a folder with metadata, or of a run's evaluations, which are written out as files first.

    Args:
        source: A folder with `metadata.jsonl`, or a run folder; the pictures then go to `<run>/evaluations/pictures`.

    Raises:
        UserError: It is neither, or a run without evaluations.
    """
    run = RunFolder(path=source)
    if (source / METADATA).is_file() or not run.config_file.is_file():
        return read_pictures(source)
    return _write_evaluations(run)


def _write_evaluations(run: RunFolder) -> list[Picture]:
    config = load_config(run.config_file)
    epochs = run.evaluated_epochs()
    if not epochs:
        raise UserError(f"{run.path} has no evaluations to take pictures from; a run makes one when it starts")
    chosen = chosen_prompts(config.evaluation, evaluation_source(run.path, config))
    check_evaluated(run.path, chosen)
    texts = [prompt.text for prompt in chosen for _ in range(config.evaluation.images_per_prompt)]
    folder = run.evaluations / "pictures"
    folder.mkdir(exist_ok=True)
    found = []
    for epoch in epochs:
        evaluation = Evaluation.load(run.evaluated(epoch), texts)
        for number, (text, image) in enumerate(zip(texts, evaluation.pictures(), strict=True)):
            path = folder / f"{run.evaluation(epoch).stem}_{number:04d}.png"
            if not path.is_file():
                with replaced(path) as partial:
                    to_pil(image).save(partial, format="png")
            found.append(Picture(prompt=text, path=path))
    write_metadata(folder, found)
    return found
