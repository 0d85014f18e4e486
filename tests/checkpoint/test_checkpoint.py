"""A checkpoint continues a run as if it had not stopped, under any layout; a damaged or foreign one is refused."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llm3d.checkpoint import box_files
from llm3d.checkpoint.load import load_checkpoint, load_pretrained
from llm3d.checkpoint.manifest import manifest_text, read_manifest
from llm3d.checkpoint.save import save_checkpoint
from llm3d.config.places import latest_checkpoint
from llm3d.corpus.tokenizer_training import train_tokenizer
from llm3d.errors import InputError, TrainingAborted
from llm3d.parallel.mesh import Mesh
from llm3d.text.tokenizer import load_tokenizer
from llm3d.train.trainer import Trainer
from tests import pool
from tests.parity.harness import LEARNING_RATE, Layout, microbatches, owned_pieces, settings

TIED = (("tie_word_embeddings", True),)
FEW = (("num_hidden_layers", 2),)
FOUR = (("num_hidden_layers", 4),)
FOUR_TIED = FOUR + TIED
State = dict[str, Tensor]  # by name of the state and of the tensor, whole


class Part(NamedTuple):
    """What one rank saw of a run: losses from the first step on, and its owned pieces after the last."""

    losses: list[float]
    grad_norms: list[float]
    pieces: Any
    before: Any  # the pieces before the first step
    loaded: dict[str, Any] | None


def run_on_rank(layout: Layout, directory: Path, start: int, stop: int, save_at: tuple[int, ...]) -> Part:
    """Train steps start .. stop - 1, from the checkpoint of step `start` where it is not 0; save after save_at."""
    mesh = Mesh(layout.tensor, layout.pipeline)
    trainer = Trainer(settings(layout), mesh)
    loaded = None
    if start:
        loaded = load_checkpoint(directory / "checkpoints" / f"step-{start:08d}", trainer)
    else:
        trainer.initialize()
    before = state_pieces(trainer)
    losses, norms = [], []
    for step in range(start, stop):
        result = trainer.step(microbatches(layout, step, mesh.data_rank), LEARNING_RATE)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step + 1 in save_at:
            save_checkpoint(directory, step + 1, trainer, {"step": step + 1, "note": "é"})
    return Part(losses, norms, state_pieces(trainer), before, loaded)


def state_pieces(trainer: Trainer) -> dict[str, list[tuple[Any, Tensor]]]:
    flat_tensors = {**trainer.optimizer.state, "master": trainer.optimizer.master}
    flat_tensors["model"] = trainer.flat.parameters
    return {name: owned_pieces(trainer, flat) for name, flat in flat_tensors.items()}


def run(layout: Layout, directory: Path, start: int, stop: int, save_at: tuple[int, ...] = ()) -> Part:
    return whole(pool.run(run_on_rank, layout.world_size, layout, directory, start, stop, save_at))


def whole(parts: list[Part]) -> Part:
    """The ranks' parts of every tensor put together."""
    reports = [part._replace(pieces={}, before={}) for part in parts]
    assert all(report == reports[0] for report in reports), "every rank reports the same"
    return reports[0]._replace(
        pieces=joined([part.pieces for part in parts]), before=joined([part.before for part in parts])
    )


def joined(parts: list[dict[str, list[tuple[Any, Tensor]]]]) -> State:
    tensors: State = {}
    for part in parts:
        for state, pieces in part.items():
            for box, value in pieces:
                target = tensors.setdefault(
                    f"{state}/{box.name}", torch.full(box.shape, torch.nan, dtype=value.dtype)
                )
                target[tuple(slice(a, a + n) for a, n in zip(box.offset, box.size, strict=True))] = value
    return tensors


def assert_equal(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


# ---- continuing ----


@pytest.mark.parametrize(
    "layout",
    [
        Layout(micro=4, model=FEW),
        Layout(micro=4, model=FEW, compute="bf16"),
        Layout(tensor=2, pipeline=2, sequence=True, micro=4, model=(*TIED, *FEW), compute="bf16"),
        Layout(tensor=2, data=2, micro=4, model=FEW),
        Layout(data=2, zero=1, model=FEW, compute="bf16"),
        Layout(pipeline=2, data=2, zero=2, model=(*TIED, *FEW)),
        Layout(tensor=2, data=2, zero=3, sequence=True, micro=2, model=FEW, compute="bf16"),
        Layout(data=8, zero=3, model=FEW),
    ],
    ids=lambda layout: f"{layout}-{layout.compute}",
)
def test_the_same_layout_continues_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    unbroken = run(layout, tmp_path, 0, 4, save_at=(2,))
    resumed = run(layout, tmp_path, 2, 4)
    assert resumed.loaded == {"step": 2, "note": "é"}
    assert (resumed.losses, resumed.grad_norms) == (unbroken.losses[2:], unbroken.grad_norms[2:])
    assert_equal(resumed.pieces, unbroken.pieces)


SAVED_BY = [
    Layout(micro=4, model=FOUR),
    Layout(tensor=4, micro=4, sequence=True, model=FOUR),  # key/value heads replicated
    Layout(pipeline=2, data=2, chunks=2, schedule="interleaved", model=FOUR),
    Layout(tensor=2, pipeline=2, model=FOUR_TIED),
    Layout(data=4, zero=3, model=FOUR),
    Layout(pipeline=2, data=2, zero=2, model=FOUR_TIED),
]
RESUMED_BY = {
    FOUR: [
        Layout(micro=4, model=FOUR),
        Layout(tensor=4, data=2, micro=2, model=FOUR),
        Layout(pipeline=4, micro=2, model=FOUR),
        Layout(tensor=2, pipeline=2, chunks=2, schedule="interleaved", sequence=True, micro=2, model=FOUR),
        Layout(tensor=2, pipeline=2, data=2, zero=1, model=FOUR),
        Layout(tensor=2, data=4, zero=3, model=FOUR),
    ],
    FOUR_TIED: [
        Layout(micro=8, model=FOUR_TIED),
        Layout(tensor=4, pipeline=2, micro=2, model=FOUR_TIED),
        Layout(tensor=4, data=2, zero=3, sequence=True, model=FOUR_TIED),
    ],
}


def resumed_by(saved_by: int) -> tuple[list[Layout], list[Layout]]:
    """Of the layouts that can resume: those that are chosen, and the others.

    A checkpoint says nothing of a layout: what one layout writes all read alike, and what one reads does not depend
    on who wrote it. So a third of the pairs, in which each layout saves and each resumes, tells as much as all.
    """
    layouts = RESUMED_BY[SAVED_BY[saved_by].model]
    chosen = [layout for i, layout in enumerate(layouts) if (i + saved_by) % 3 == 0]
    return chosen, [layout for layout in layouts if layout not in chosen]


PAIRS = [
    pytest.param(layout, resumed, id=f"{layout}-{name}", marks=marks)
    for i, layout in enumerate(SAVED_BY)
    for resumed, name, marks in zip(
        resumed_by(i), ("chosen", "others"), ([], pytest.mark.all_layouts), strict=True
    )
]


@pytest.mark.parametrize(("saved_by", "resumed_by"), PAIRS)
def test_any_layout_continues_what_any_other_saved(
    saved_by: Layout, resumed_by: list[Layout], tmp_path: Path
) -> None:
    first = run(saved_by, tmp_path, 0, 2, save_at=(2,))
    expected = run(saved_by, tmp_path, 2, 4)
    for layout in resumed_by:
        resumed = run(layout, tmp_path, 2, 4)
        assert_equal(resumed.before, first.pieces)
        assert resumed.losses == pytest.approx(expected.losses, rel=1e-5)
        assert resumed.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


def test_weights_pass_between_precisions(tmp_path: Path) -> None:
    fp32, bf16 = Layout(micro=4, model=FEW), Layout(tensor=2, micro=4, model=FEW, compute="bf16")
    from_fp32 = run(fp32, tmp_path / "fp32", 0, 2, save_at=(2,))
    in_bf16 = run(bf16, tmp_path / "fp32", 2, 2).pieces
    from_bf16 = run(bf16, tmp_path / "bf16", 0, 2, save_at=(2,))
    in_fp32 = run(fp32, tmp_path / "bf16", 2, 2).pieces
    for state in ("master", "exp_avg", "exp_avg_sq"):
        for name in (name for name in in_bf16 if name.startswith(f"{state}/")):
            assert torch.equal(in_bf16[name], from_fp32.pieces[name])
            assert torch.equal(in_fp32[name], from_bf16.pieces[name])
    for name in (name for name in in_bf16 if name.startswith("model/")):
        assert torch.equal(in_bf16[name], from_fp32.pieces[name].bfloat16())
        assert torch.equal(in_fp32[name], from_bf16.pieces[name.replace("model/", "master/")])


@pytest.mark.parametrize("zero", [0, 3])
def test_weights_are_the_same_however_many_files_hold_them(zero: int, tmp_path: Path) -> None:
    layout = Layout(tensor=2, pipeline=2, data=2, zero=zero, micro=2, model=FOUR)
    part = whole(pool.run(save_in_small_files, 8, layout, tmp_path))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    files = sorted(path.name for path in (checkpoint / "model").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 8
    index = json.loads((checkpoint / "model" / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"].values()) == set(files)
    assert_equal(run(Layout(micro=4, model=FOUR), tmp_path, 1, 1).pieces, part.pieces)
    # The ranks of a model replica share the writing of the optimizer's state with their data ranks.
    sizes = [path.stat().st_size for path in (checkpoint / "optimizer").iterdir()]
    assert len({path.name[:10] for path in (checkpoint / "optimizer").iterdir()}) == 8
    assert sum(sizes) < 1.1 * sum(
        8 * value.numel() for name, value in part.pieces.items() if "model/" in name
    )


def save_in_small_files(layout: Layout, directory: Path) -> Part:
    with mock.patch.object(box_files, "FILE_BYTES", 200_000):
        return run_on_rank(layout, directory, 0, 1, save_at=(1,))


def save_with_tokenizer_on_rank(directory: Path, tokenizer: Path) -> None:
    trainer = Trainer(settings(Layout(data=2, model=FEW)), Mesh())
    trainer.initialize()
    save_checkpoint(directory, 1, trainer, {}, load_tokenizer(tokenizer))


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_the_tokenizer_lies_beside_the_weights(kind: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} + {i} = {2 * i}. Wahrlich, {chr(0x4E00 + i)}!\n" for i in range(300)))
    train_tokenizer([text], tmp_path / kind, kind, 600 if kind == "sentencepiece" else 400)
    pool.run(save_with_tokenizer_on_rank, 2, tmp_path, tmp_path / kind)
    model = tmp_path / "checkpoints" / "step-00000001" / "model"
    tokenizer = load_tokenizer(model)
    sample = "7 + 7 = 14. Wahrlich, 一! ü"
    assert tokenizer.encode(sample) == load_tokenizer(tmp_path / kind).encode(sample)
    theirs = AutoTokenizer.from_pretrained(model)
    assert theirs(sample, add_special_tokens=False)["input_ids"] == tokenizer.encode(sample)
    recorded = read_manifest(model.parent).files
    assert {f"model/{path.name}" for path in model.iterdir()} == {*recorded, "model/model.safetensors"} - {
        "state.json",
        "meaning.json",
    }


class SavedBesideAnotherRank:
    """A tokenizer during whose saving another rank begins to write weights."""

    bos_id, end_ids = None, ()

    def __init__(self, partial: Path) -> None:
        self.partial = partial

    def save_to(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")
        (self.partial / "model" / "model-00009.safetensors").write_bytes(b"half a file")


def save_beside_another_rank(directory: Path) -> None:
    trainer = Trainer(settings(Layout(model=FEW)), Mesh())
    trainer.initialize()
    partial = directory / "checkpoints" / ".step-00000001.partial"
    save_checkpoint(directory, 1, trainer, {}, SavedBesideAnotherRank(partial))


def test_weights_that_another_rank_is_writing_are_not_taken_for_the_tokenizers(tmp_path: Path) -> None:
    pool.run(save_beside_another_rank, 1, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    recorded = read_manifest(checkpoint).files
    assert "model/tokenizer.json" in recorded and "model/model-00009.safetensors" not in recorded
    assert {path.name for path in checkpoint.iterdir()} == {
        "manifest.json",
        "meaning.json",
        "model",
        "optimizer",
        "state.json",
    }


# ---- what is kept, and what is never half there ----


def save_often_on_rank(directory: Path, steps: tuple[int, ...], keep: int | None) -> None:
    trainer = Trainer(settings(Layout(tensor=2, micro=4, model=FEW)), Mesh(tensor=2))
    trainer.initialize()
    for step in steps:
        save_checkpoint(directory, step, trainer, {"step": step}, keep=keep)


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, in which there is nothing else."""
    return sorted(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    pool.run(save_often_on_rank, 2, tmp_path, (1, 2, 10, 3), 2)
    assert saved_steps(tmp_path) == [2, 3, 10]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000010"


def test_what_a_killed_run_left_is_not_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    pool.run(save_often_on_rank, 2, tmp_path, (1, 2, 3), None)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000003").rename(checkpoints / ".step-00000003.partial")
    (checkpoints / "step-00000002").rename(checkpoints / ".step-00000002.replaced")
    (checkpoints / "step-00000009").mkdir()  # not ours: no manifest
    assert latest_checkpoint(tmp_path) == checkpoints / "step-00000001"
    pool.run(save_often_on_rank, 2, tmp_path, (4, 4), None)
    assert saved_steps(tmp_path) == [1, 2, 4, 9]


def fail_to_save_on_rank(directory: Path, failing_rank: int, failing_file: str | None) -> list[str]:
    """Replace a checkpoint, then save a new one, where one rank cannot write a file (or any of more than 1 KB)."""
    mesh = Mesh(tensor=2, pipeline=2)
    trainer = Trainer(settings(Layout(tensor=2, pipeline=2, model=FEW)), mesh)
    trainer.initialize()
    save_checkpoint(directory, 1, trainer, {"step": 1})
    trouble: Any = nullcontext()
    if mesh.rank == failing_rank:
        trouble = (
            no_large_files() if failing_file is None else mock.patch.multiple(Path, **full_disk(failing_file))
        )
    messages = []
    with trouble:
        for step in (1, 2):
            with pytest.raises(TrainingAborted) as aborted:
                save_checkpoint(directory, step, trainer, {"step": step})
            messages.append(str(aborted.value))
    load_checkpoint(directory / "checkpoints" / "step-00000001", trainer)
    return messages


@contextmanager
def no_large_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(file: str) -> dict[str, Any]:
    """Methods of Path that write and rename, but not a file whose name ends like this."""

    def failing(method: Any) -> Any:
        def wrapped(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name.endswith(file):
                raise OSError(errno.ENOSPC, "No space left on device")
            return method(path, *args, **kwargs)

        return wrapped

    return {name: failing(getattr(Path, name)) for name in ("write_text", "rename")}


@pytest.mark.parametrize(
    ("rank", "file"), [(2, None), (0, "state.json"), (0, "manifest.json"), (0, ".partial")]
)
def test_a_rank_that_cannot_write_stops_all_and_leaves_what_was(
    tmp_path: Path, rank: int, file: str | None
) -> None:
    messages = pool.run(fail_to_save_on_rank, 4, tmp_path, rank, file)
    assert all(message == messages[0] for message in messages)
    for message in messages[0]:
        assert ("File too large" if file is None else "No space left on device") in message
        assert str(tmp_path / "checkpoints") in message
    assert saved_steps(tmp_path) == [1]


def test_a_directory_that_cannot_be_made_stops_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(pool.WorkerFailed, match=r"TrainingAborted: checkpoint: .*checkpoints: File exists"):
        pool.run(save_often_on_rank, 2, tmp_path, (1,), None)


# ---- damaged and foreign checkpoints ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run(Layout(micro=4, model=FEW), directory, 0, 1, save_at=(1,))
    return directory / "checkpoints" / "step-00000001"


def refusals_on_rank(layout: Layout, checkpoints: list[Path]) -> list[str]:
    trainer = Trainer(settings(layout), Mesh(layout.tensor, layout.pipeline))
    messages = []
    for checkpoint in checkpoints:
        with pytest.raises(InputError) as refused:
            load_checkpoint(checkpoint, trainer)
        messages.append(str(refused.value))
    return messages


def refusals(layout: Layout, *checkpoints: Path) -> list[str]:
    """Each checkpoint's refusal, which is one line and the same on all ranks."""
    messages = pool.run(refusals_on_rank, layout.world_size, layout, list(checkpoints))
    assert all(other == messages[0] for other in messages)
    assert not any("\n" in message for message in messages[0])
    return messages[0]


def test_damage_is_found_wherever_it_is(saved: Path, tmp_path: Path) -> None:
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    copies: list[Path] = []
    names: list[str] = []
    for path in files:
        for damage in (flip_a_byte, cut_short, Path.unlink):
            copy = tmp_path / f"{len(copies)}"
            shutil.copytree(saved, copy)
            damage(copy / path.relative_to(saved))
            copies.append(copy)
            names.append(path.name)
    assert {"manifest.json", "state.json", "config.json", "model.safetensors"} <= set(names)
    for message, name in zip(refusals(Layout(tensor=2, micro=4, model=FEW), *copies), names, strict=True):
        assert name in message
        assert "remove" in message or "not a complete checkpoint" in message


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def test_a_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"  # of a version that did not write down what a checkpoint means
    shutil.copytree(saved, old)
    (old / "meaning.json").unlink()

    def refused(checkpoint: Path = old, **changes: Any) -> str:
        model = tuple({**dict(FEW), **changes}.items())
        return refusals(Layout(tensor=2, micro=4, model=model), checkpoint)[0]

    assert "has no tensor model.layers.2" in refused(num_hidden_layers=3)
    assert "has a tensor that the model has not, model.layers.1" in refused(num_hidden_layers=1)
    assert "a tensor that the model has not, lm_head.weight" in refused(tie_word_embeddings=True)
    message = refused(intermediate_size=176)
    assert "shape [172, 120]" in message or "shape [120, 172]" in message
    assert "[176, 120]" in message or "[120, 176]" in message
    for name, now, stored in (
        ("num_attention_heads", 6, 12),
        ("rope_theta", 5000.0, 10000.0),
        ("rms_norm_eps", 1e-6, 1e-5),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, None),
    ):
        shapes = {"num_key_value_heads": 2, "head_dim": 20} if name == "num_attention_heads" else {}
        message = refused(saved, **{name: now}, **shapes)
        assert (
            message.startswith(f"model.{name}: ")
            and str(stored or "null") in message
            and "run.dir" in message
        )


def test_an_unknown_format_is_refused(saved: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(saved, newer)
    content = json.loads((newer / "manifest.json").read_bytes())
    content |= {"format": 2, "llm3d": "9.0"}
    (newer / "manifest.json").write_text(json.dumps(content))
    no_moments = tmp_path / "no_moments"
    shutil.copytree(saved, no_moments)
    found = read_manifest(saved)
    boxes = [box for name in found.tensors if not name.startswith("exp_avg/") for box in found.boxes(name)]
    (no_moments / "manifest.json").write_text(manifest_text(1, 1, {}, {}, boxes))
    first, second = refusals(Layout(model=FEW), newer, no_moments)
    assert "format 2" in first and "llm3d 9.0" in first
    assert "has no tensor exp_avg/" in second


def pretrained_on_rank(layout: Layout, directory: Path) -> Part:
    trainer = Trainer(settings(layout), Mesh(layout.tensor, layout.pipeline))
    load_pretrained(directory, trainer)
    return Part([], [], {"model": owned_pieces(trainer, trainer.flat.parameters)}, {}, None)


def test_training_starts_from_the_weights_of_a_checkpoint(saved: Path) -> None:
    expected = run(Layout(micro=4, model=FEW), saved.parent.parent, 1, 1).pieces
    for directory in (saved, saved / "model"):
        layout = Layout(tensor=2, pipeline=2, micro=2, model=FEW)
        actual = whole(pool.run(pretrained_on_rank, 4, layout, directory)).pieces
        assert_equal(actual, {name: value for name, value in expected.items() if name.startswith("model/")})
