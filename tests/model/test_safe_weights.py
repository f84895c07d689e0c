"""Weights and tokenizers that a user may have downloaded, made to attack: no code runs, one line says why."""

import json
import pickle
import struct
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from attacks import Writes, one_line
from saved import saved_run
from starting import program
from torch import nn

from sacl_ds.config_file import load_config
from sacl_ds.data.text import Tokenizer
from sacl_ds.errors import UserError
from sacl_ds.model.starts.weights_file import read_weights


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["w.pt", "w.bin"])
def test_a_pickle_in_weights(name: str, zipped: bool, tmp_path: Path, proof: Path) -> None:
    content = {"model": {"w": torch.ones(2)}, "more": Writes(proof)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="objects other than tensors, which may run code when loaded") as error:
        read_weights(str(tmp_path / name), "model.start")
    assert one_line(error)
    assert not proof.exists()
    torch.load(tmp_path / name, weights_only=False)  # the attack is one
    assert proof.exists()


def test_a_plain_pickle_as_weights(tmp_path: Path, proof: Path) -> None:
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Writes(proof)))
        with pytest.raises(UserError) as error:
            read_weights(str(tmp_path / name), "model.image_weights")
        assert one_line(error)
    assert not proof.exists()


class Script(nn.Module):
    """A TorchScript module whose `__setstate__`, which `torch.jit.load` runs, writes to the file PROOF."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.path = "PROOF"

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.w, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.path, self.training = state[1], state[2]
        self.w = state[0] + torch.from_file(state[1], True, 8, dtype=torch.uint8).fill_(65).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_that_writes_a_file(tmp_path: Path, proof: Path) -> None:
    module = Script()
    module.path = str(proof)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(tmp_path / "w.pt"))
        assert not proof.exists()
        with pytest.raises(UserError, match="no state dict in it") as error:
            read_weights(str(tmp_path / "w.pt"), "model.image_weights")
        assert one_line(error)
        assert not proof.exists()
        torch.jit.load(str(tmp_path / "w.pt"))  # the attack is one
    assert proof.read_bytes() == b"A" * 8


def archive(path: Path, content: object, data: bytes = b"", compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as made:
        made.writestr("a/constants.pkl", b"")
        made.writestr("a/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content, 2))
        made.writestr("a/data/0", data)
    return path


def tensor_pickle(size: int, count: int = 2, stride: int = 1) -> bytes:
    """A module with one tensor of `size` values on a storage of `count`, as TorchScript pickles it."""
    long = struct.Struct("<i").pack
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ" + long(count) + b"tQ"
    rest = b"K\0(J" + long(size) + b"t(J" + long(stride) + b"t\x89ccollections\nOrderedDict\n)RtR"
    head = b"\x80\x02c__torch__\nM\n)\x81}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n"
    return head + storage + rest + b"sb."


def test_what_torchscript_archives_may_hold(tmp_path: Path, proof: Path) -> None:
    path = tmp_path / "w.pt"
    values = np.array([1.5, 2.5], "<f4").tobytes()
    found = read_weights(str(archive(path, tensor_pickle(2), values)), "x")
    assert found.torchscript
    assert found.tensors["w"].tolist() == [1.5, 2.5]
    for content, data, compress, said in (
        (Writes(proof), b"", 0, "names posix.mkdir"),
        (tensor_pickle(1000, stride=0), values, 0, "larger than its data"),
        (tensor_pickle(3), values, 0, "larger than its data"),
        (tensor_pickle(2, count=9), values, 0, "is damaged"),
        (tensor_pickle(2), bytes(1 << 20), zipfile.ZIP_DEFLATED, "is compressed"),
        (b"\x80\x02", b"", 0, "EOFError"),
        (b"\x80\x02c__torch__\nM\n)\x81q\0}(X\x01\0\0\0ah\0X\x01\0\0\0bh\0ub.", b"", 0, "more than 10000 modules"),
    ):
        with pytest.raises(UserError, match=f"damaged or more than weights .*{said}") as error:
            read_weights(str(archive(path, content, data, compress)), "x")
        assert one_line(error)
    assert not proof.exists()


def test_a_state_dict_within_itself(tmp_path: Path) -> None:
    endless: dict = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state dict in it"):
        read_weights(str(tmp_path / "w.pt"), "model.start")


def test_timm_is_given_no_files(tmp_path: Path) -> None:
    for name in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        with pytest.raises(UserError, match="it names files, not an architecture"):
            load_config(None, [f"model.image_encoder_arguments={{{name}: {tmp_path}/evil.pth}}"])


def answering(path: Path) -> None:
    """Take what is asked for on the terminal from that file."""
    sys.stdin = path.open()


def test_a_folder_with_code_of_its_own(tmp_path: Path, proof: Path) -> None:
    """As transformers runs it where `trust_remote_code` is given, or a question on the terminal answered with yes."""
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Own: pass\n")
    named = {"AutoConfig": "code.Own", "AutoTokenizer": ["code.Own", None], "AutoModel": "code.Own"}
    config = json.dumps({"model_type": "own", "auto_map": named, "tokenizer_class": "Own"})
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(config)
    (tmp_path / "script").mkdir()
    (tmp_path / "script/load.py").write_text(
        "import sys; from sacl_ds.data.text import Tokenizer; from sacl_ds.model.starts.text import bert_positions\n"
        "from sacl_ds.errors import UserError\n"
        "for load in (lambda: Tokenizer.load(sys.argv[1], 8), lambda: bert_positions(sys.argv[1])):\n"
        "    try: load()\n"
        "    except UserError as error: print(error)\n"
    )
    (tmp_path / "answers").write_text("y\ny\n")
    done = program(str(tmp_path / "script/load.py"), tmp_path, before=partial(answering, tmp_path / "answers"))
    assert done.stdout.count("cannot be loaded") == 2, done.stdout + done.stderr
    assert "[y/N]" not in done.stdout
    assert not proof.exists()


def test_a_tokenizer_that_is_damaged(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", 1, teacher=False)
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Evil"}}', b"[" * 5000):
        (run / "tokenizer/tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer=") as error:
            Tokenizer.load(run / "tokenizer", 8)
        assert one_line(error)
