"""A task's configuration: what lies over what, and the lines for mistakes."""

from pathlib import Path

import pytest
import yaml
from saved import saved_run
from starting import ROOT

from sacl_ds.config.finetune import TASKS
from sacl_ds.errors import UserError
from sacl_ds.tasks.configuration import evaluation_config, finetune_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("base") / "run", seed=3, teacher=False)


# learning rates of the image encoder and of the rest, batch, epochs: the paper's table of fine-tuning
PAPER = {"vqa": (2e-5, 5e-6, 1024, 8), "retrieval": (1e-5, 2e-6, 256, 5), "nlvr2": (5e-5, 5e-6, 256, 15)}


@pytest.mark.parametrize("task", TASKS)
def test_files_are_trained_on_as_in_the_paper(task: str) -> None:
    settings = finetune_config(task, None, ["data.source=files"])
    optim, train = settings.optim, settings.train
    assert (optim.lr_image, optim.lr_text, train.global_batch_size, train.epochs) == PAPER[task]
    assert (optim.weight_decay, optim.schedule) == (0.05, "cosine")
    assert settings.augment.operations == 2
    assert train.steps is None


@pytest.mark.parametrize("task", TASKS)
def test_the_files_of_the_paper_are_valid(task: str) -> None:
    settings = finetune_config(None, str(ROOT / f"launch/configs/finetune_{task}.yaml"), [])
    assert settings.task == task
    assert settings.optim.lr_image == PAPER[task][0]
    assert settings.model.image_size == 384


def test_the_checkpoint_brings_the_model_and_arguments_lie_over_it(run: Path) -> None:
    settings = finetune_config("vqa", None, [f"checkpoint={run}", "model.image_size=64"])
    assert (settings.model.text_width, settings.model.embed_dim) == (32, 16)  # of the run
    assert settings.model.image_size == 64
    assert settings.model.image_encoder_arguments["embed_dim"] == 32
    step = run / "checkpoints/step_00000010"
    step.mkdir(parents=True)
    assert finetune_config("vqa", None, [f"checkpoint={step}"]).model.text_width == 32


def test_an_evaluation_takes_over_what_the_run_was_trained_with(run: Path, tmp_path: Path) -> None:
    trained = finetune_config("vqa", None, [f"checkpoint={run}", "vqa.ranked=7", "data.scenes.eval_count=9"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(trained.model_dump(mode="json")))
    settings = evaluation_config(None, None, [f"checkpoint={tmp_path}", "data.scenes.eval_count=11"])
    assert (settings.task, settings.vqa.ranked, settings.data.scenes.eval_count) == ("vqa", 7, 11)
    assert settings.checkpoint == str(tmp_path)
    assert settings.output_dir is None


LINES = {
    "no task": ([], "--task is missing: retrieval or vqa or nlvr2"),
    "misspelt task": (["task=vqaa"], "--task vqaa: choose retrieval, vqa, nlvr2 (did you mean vqa?)"),
    "misspelt setting": (
        ["task=vqa", "vqa.rankd=3"],
        "unknown key 'vqa.rankd' in argument 'vqa.rankd=3' (did you mean 'vqa.ranked'?)",
    ),
    "no such checkpoint": (
        ["task=vqa", "checkpoint=/nowhere"],
        "checkpoint=/nowhere: no such folder; correct the path",
    ),
    "augmented scenes": (
        ["task=vqa", "augment.flip=true"],
        "crops, flips and RandAugment falsify what is said of scenes; leave the room augment alone "
        "(in argument 'augment.flip=true')",
    ),
    "MLM": (["task=retrieval", "loss.mlm_weight=1"], "loss.mlm_weight=1: fine-tuning has no MLM; leave it out"),
}


@pytest.mark.parametrize("arguments", LINES.values(), ids=LINES.keys())
def test_mistakes(arguments: tuple[list[str], str]) -> None:
    with pytest.raises(UserError) as caught:
        finetune_config(None, None, arguments[0])
    assert str(caught.value).startswith(arguments[1])


def test_mistakes_about_checkpoints(run: Path, tmp_path: Path) -> None:
    weights = tmp_path / "albef.pth"
    weights.write_bytes(b"")
    for checkpoint, line in (
        (weights, "is a file; give the directory of a run, or weights of elsewhere as model.start"),
        (tmp_path, "no config.yaml there; give the directory of a run, or its checkpoints/step_N"),
    ):
        with pytest.raises(UserError, match=line):
            finetune_config("nlvr2", None, [f"checkpoint={checkpoint}"])
    with pytest.raises(UserError, match="checkpoint is missing: checkpoint=RUN"):
        evaluation_config("retrieval", None, [])
    with pytest.raises(UserError, match="is a pre-training run, which answers nothing yet; fine-tune it first: "):
        evaluation_config("vqa", None, [f"checkpoint={run}"])
    with pytest.raises(UserError, match="--task vqa, but the configuration says task: nlvr2; leave one of them out"):
        finetune_config("vqa", None, ["task=nlvr2"])
    trained = finetune_config("nlvr2", None, [f"checkpoint={run}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(trained.model_dump(mode="json")))
    with pytest.raises(UserError, match="was fine-tuned for nlvr2; evaluate that, or give another checkpoint"):
        evaluation_config("vqa", None, [f"checkpoint={tmp_path}"])
