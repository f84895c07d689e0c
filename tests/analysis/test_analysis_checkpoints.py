"""A checkpoint of every ZeRO stage, saved by two ranks, is read by one process."""

import json
from pathlib import Path

import pytest
import torch
from starting import ROOT, start

from sacl_ds.analysis.patches import load_selecting
from sacl_ds.analysis.subject import load_subject
from sacl_ds.errors import UserError

SHORT = ["train.steps=4", "train.save_every=2", "teacher.steps=0", "loss.matching_weight=0", "loss.mlm_weight=0"]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_checkpoints_hold_the_weights_of_the_run(stage: int, tmp_path: Path) -> None:
    """The last one those that the run itself gathered and saved, an earlier one others."""
    settings = json.loads((ROOT / "ds_configs/zero1.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    run = tmp_path / "run"
    start(run, "--ds_config", str(tmp_path / "ds.json"), *SHORT, ranks=2)
    finished = load_subject(run)
    last, earlier = (load_subject(run / f"checkpoints/step_{step:08d}") for step in (4, 2))
    assert [subject.step for subject in (finished, last, earlier)] == [4, 4, 2]
    assert last.folder == run
    expected, same, other = (subject.model.state_dict() for subject in (finished, last, earlier))
    assert all(torch.equal(expected[name], same[name]) for name in expected)
    assert not all(torch.equal(expected[name], other[name]) for name in expected)
    if stage == 0:
        selecting, _ = load_selecting(run / "checkpoints/step_00000002", ["placement=tower", "layers=[1]"])
        assert selecting.image_encoder.layers
        assert all(torch.equal(other[name], value) for name, value in selecting.state_dict().items())
        (run / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"is not finished .*checkpoints/step_N"):
            load_subject(run)
        (run / "checkpoints/step_00000002/state.json").unlink()
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            load_subject(run / "checkpoints/step_00000002")
        file = run / "checkpoints/step_00000004/rank_00000.safetensors"
        whole = file.read_bytes()
        for damaged, said in ((b"cut", "checksum"), (whole[:-1] + bytes([whole[-1] ^ 1]), "checksum")):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"is damaged: rank_00000.safetensors: its {said}"):
                load_subject(run / "checkpoints/step_00000004")
