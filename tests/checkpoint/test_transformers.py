"""transformers as the oracle: the same weights give the same logits and gradients, whoever wrote them."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llm3d.checkpoint.load import load_pretrained
from llm3d.checkpoint.save import save_checkpoint
from llm3d.config import PretrainConfig
from llm3d.config.hugging_face import hugging_face_shape
from llm3d.data.pretraining import Microbatch, Window, collate
from llm3d.errors import InputError
from llm3d.parallel.boxes import Box
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Trainer
from tests import pool
from tests.closeness import assert_same_logits
from tests.parity.harness import Layout, owned_pieces, settings

LENGTH = 48
SHAPE = {
    "vocab_size": 515,
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama-1": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6},
    "llama-3.1": {
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500_000.0, **LLAMA_3_ROPE},
    },
    "llama-3.2": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
    },
    "linear": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0},
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 20, "rms_norm_eps": 1e-6},
    "qwen3-tied": {
        "model_type": "qwen3",
        "num_attention_heads": 20,  # which do not divide the hidden size
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
    },
}


def samples() -> list[Window]:
    """Two samples; the first packs three documents."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(int(SHAPE["vocab_size"]), (2, LENGTH + 1), generator=generator)
    return [Window(tokens[0], [0, 5, 30]), Window(tokens[1], [0])]


# ---- what transformers wrote ----


@pytest.fixture(scope="module", params=KINDS)
def oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LlamaForCausalLM]:
    torch.manual_seed(0)
    fields = {"model_type": "llama"} | SHAPE | KINDS[request.param]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    directory = tmp_path_factory.mktemp(request.param)
    # Sharded and not; both are in use.
    model.save_pretrained(directory, max_shard_size="100KB" if request.param != "linear" else "1GB")
    assert len(list(directory.glob("*.safetensors"))) > 3 or request.param == "linear"
    return directory, model


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=4), Layout(tensor=2, pipeline=2, sequence=True)], ids=str
)
def test_logits_and_gradients_are_those_of_transformers(
    oracle: tuple[Path, LlamaForCausalLM], layout: Layout
) -> None:
    directory, model = oracle
    expected_logits, expected_gradients = with_transformers(model)
    parts = pool.run(with_ours, layout.world_size, layout, directory)
    assert_same_logits(parts[-1][0], expected_logits)
    gradients = joined([gradient for _, pieces in parts for gradient in pieces])
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() < 1e-5 * expected.norm(), name


def with_transformers(model: LlamaForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of each document by itself, one after the other, and gradients of the mean loss over all targets."""
    model.zero_grad()
    logits, batch = [], collate(samples())
    bounds = batch.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        logits.append(model(batch.tokens[None, start:stop]).logits[0])
    together = torch.cat(logits)
    torch.nn.functional.cross_entropy(together, batch.targets, ignore_index=-100).backward()
    return together.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def with_ours(layout: Layout, directory: Path) -> tuple[Tensor | None, list[tuple[Box, Tensor]]]:
    """Logits of the packed documents, on the last stage; this rank's owned gradients."""
    trainer = make_trainer(layout, directory)
    load_pretrained(directory, trainer)
    logits = whole_logits(trainer, collate(samples()))
    trainer.step([collate([sample]) for sample in samples()], lr=0.0)
    return logits, owned_pieces(trainer, trainer.flat.gradients)


def make_trainer(layout: Layout, directory: Path) -> Trainer:
    """A trainer for the model of a Hugging Face directory."""
    base = settings(layout).model_dump(mode="json", by_alias=True)
    base["model"] = hugging_face_shape(directory / "config.json")
    base["data"]["sequence_length"] = LENGTH
    config = PretrainConfig.model_validate_json(json.dumps(base))
    return Trainer(config, Mesh(layout.tensor, layout.pipeline))


@torch.no_grad()
def whole_logits(trainer: Trainer, batch: Microbatch) -> Tensor | None:
    """fp32 [tokens, vocab_size] on the last stage. One chunk a rank; the stages run one after the other."""
    mesh, (stage,) = trainer.mesh, trainer.stages
    channel = mesh.channels.get(("forward", False))
    hidden = None
    for sender in range(mesh.pipeline_size):
        if mesh.pipeline_rank == sender:
            hidden = stage.transform(hidden, batch)
            if sender + 1 < mesh.pipeline_size:
                torch.distributed.send(hidden, group=channel, group_dst=sender + 1)
        elif mesh.pipeline_rank == sender + 1:
            tokens = len(batch.tokens) // (mesh.tensor_size if trainer.config.parallel.sequence else 1)
            hidden = torch.empty(tokens, trainer.config.model.hidden_size, dtype=trainer.dtype)
            torch.distributed.recv(hidden, group=channel, group_src=sender)
    if stage.head is None:
        return None
    local = stage.head.logits(hidden).float()
    everyone = gather_bytes(local.contiguous().numpy().tobytes(), mesh.tensor)
    parts = [
        torch.frombuffer(bytearray(part), dtype=torch.float32).view(len(local), -1)
        for part in everyone
        if part
    ]
    return torch.cat(parts, dim=1)


def joined(pieces: list[tuple[Box, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for box, value in pieces:
        target = tensors.setdefault(box.name, torch.full(box.shape, torch.nan))
        target[box.slices_within(Box.whole(box.name, box.shape))] = value
    return tensors


# ---- what we wrote ----


def save_ours(layout: Layout, directory: Path, kind: str) -> Tensor | None:
    base = settings(layout).model_dump(mode="json", by_alias=True)
    fields = dict(KINDS[kind])
    rope = fields.pop("rope_parameters", {"rope_theta": 10_000.0, "rope_type": "default"})
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    base["model"] = {**SHAPE, **fields, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    base["model"] |= {"bos_token_id": 1, "eos_token_id": [2, 3]}
    base["data"]["sequence_length"] = LENGTH
    trainer = Trainer(
        PretrainConfig.model_validate_json(json.dumps(base)), Mesh(layout.tensor, layout.pipeline)
    )
    trainer.initialize()
    save_checkpoint(directory, 1, trainer, {})
    return whole_logits(trainer, collate([samples()[1]]))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama-1", Layout()),
        ("llama-1", Layout(tensor=2, pipeline=2, data=2, sequence=True)),
        ("llama-3.1", Layout(tensor=4, data=2)),
        ("llama-3.2", Layout(tensor=2, pipeline=2)),
        ("linear", Layout(pipeline=2, data=2)),
        ("llama-3.1", Layout(tensor=2, compute="bf16")),
        ("qwen3", Layout(tensor=4, data=2)),
        ("qwen3-tied", Layout(tensor=2, pipeline=2, sequence=True)),
    ],
    ids=str,
)
def test_transformers_loads_what_any_layout_saved(
    kind: str, layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = pool.run(save_ours, layout.world_size, layout, tmp_path, kind)[-1]
    directory = tmp_path / "checkpoints" / "step-00000001" / "model"
    assert [path.name for path in directory.glob("*.safetensors*")] == ["model.safetensors"], "it is small"
    transformers.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model, report = loaded
    assert [record.message for record in caplog.records] == []
    assert not any(report.values()), report
    assert model.dtype == (torch.bfloat16 if layout.compute == "bf16" else torch.float32)
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [2, 3]
    with torch.no_grad():
        theirs = model(samples()[1].tokens[None, :-1]).logits[0].float()
    if layout.compute == "bf16":
        # As far from fp32 as their own bf16, within a factor of two.
        with torch.no_grad():
            exact = model.float()(samples()[1].tokens[None, :-1]).logits[0]
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    else:
        assert_same_logits(ours, theirs)


def test_settings_survive_the_journey_through_transformers(
    oracle: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    """config.json as we write it and as transformers writes it say the same, to us and to transformers."""
    directory, model = oracle
    pool.run(save_again, 1, directory, tmp_path)
    ours = tmp_path / "checkpoints" / "step-00000001" / "model"
    assert hugging_face_shape(ours / "config.json") == hugging_face_shape(directory / "config.json")
    again = AutoConfig.from_pretrained(ours)
    fields = (
        "rope_parameters",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
    )
    assert {name: getattr(again, name) for name in fields} == {
        name: getattr(model.config, name) for name in fields
    }


def save_again(directory: Path, run_dir: Path) -> None:
    trainer = make_trainer(Layout(), directory)
    load_pretrained(directory, trainer)
    save_checkpoint(run_dir, 1, trainer, {})


# ---- directories that cannot be used ----


def refusal_on_rank(directory: Path, config_of: Path) -> str:
    trainer = make_trainer(Layout(tensor=2), config_of)
    with pytest.raises(InputError) as refused:
        load_pretrained(directory, trainer)
    return str(refused.value)


def refusal(directory: Path, config_of: Path) -> str:
    messages = pool.run(refusal_on_rank, 2, directory, config_of)
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def test_unusable_directories_are_refused(tmp_path: Path) -> None:
    def written(name: str, **changes: Any) -> Path:
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, **changes}))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    good = written("good")
    assert "model.layers.1.input_layernorm.weight (9 missing" in refusal(
        written("shallow", num_hidden_layers=1), good
    )
    assert "no place in the model" in refusal(written("deep", num_hidden_layers=3), good)
    assert "no place in the model" in refusal(written("biased", attention_bias=True), good)
    assert "has shape [516, 96]" in refusal(written("wide", vocab_size=516), good)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither model.safetensors nor" in refusal(empty, good)
    (empty / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert "pickled" in refusal(empty, good) and "save_pretrained" in refusal(empty, good)
    (empty / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "weight_map" in refusal(empty, good)
    cut = good / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    assert "model.safetensors: damaged" in refusal(good, good)


def changed_tensors(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Tensors of the one file added, replaced or, with None, taken out."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors") | {k: v for k, v in changes.items() if v is not None}
    kept = {name: value for name, value in tensors.items() if changes.get(name, value) is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def test_no_tensor_is_left_out_unless_it_says_what_the_settings_say(tmp_path: Path) -> None:
    """Rotary frequencies of old conversions; a head beside the embedding that it is tied to."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **KINDS["llama-3.2"]))
    model.save_pretrained(tmp_path)
    frequencies = LlamaForCausalLM(LlamaConfig(**SHAPE)).model.rotary_emb.inv_freq
    theta = model.config.rope_parameters["rope_theta"] / 10000
    exponents = torch.arange(len(frequencies)) / len(frequencies)
    right, name = frequencies / theta**exponents, "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed_tensors(tmp_path, {name: right.bfloat16()})
    assert pool.run(logits_of, 2, tmp_path)[0] is not None
    changed_tensors(tmp_path, {name: frequencies})
    assert "the rotary frequencies model.layers.0." in refusal(tmp_path, tmp_path)
    table = model.model.embed_tokens.weight.detach()
    changed_tensors(tmp_path, {name: None, "lm_head.weight": table + torch.eye(*table.shape)})
    message = refusal(tmp_path, tmp_path)
    assert "lm_head.weight is not model.embed_tokens.weight" in message and "tie_word_embeddings" in message


def test_an_index_and_its_files_have_to_agree(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})).save_pretrained(
        tmp_path, max_shard_size="300KB"
    )
    index = tmp_path / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))

    def refused(changes: dict[str, str]) -> str:
        index.write_text(json.dumps({"weight_map": said["weight_map"] | changes}))
        return refusal(tmp_path, tmp_path)

    assert "'../other.safetensors', which is no file of this directory" in refused(
        {"lm_head.weight": "../other.safetensors"}
    )
    assert "missing.safetensors: missing" in refused({"lm_head.weight": "missing.safetensors"})
    assert f"{first.name}: holds no tensor b, though" in refused({"b": first.name})
    tensors = load_file(second)
    save_file(tensors | {"a": torch.zeros(2)}, second)
    assert f"{second.name}: holds a tensor a that model.safetensors.index.json does not" in refused({})
    save_file(tensors, tmp_path / "model.safetensors")
    assert "holds both model.safetensors and model.safetensors.index.json" in refused({})


def test_a_tied_model_may_carry_its_head_in_either_place(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **KINDS["llama-3.2"]))
    expected = model(samples()[1].tokens[None, :-1]).logits[0].detach()
    for number, names in enumerate((["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"])):
        directory = tmp_path / str(number)
        model.save_pretrained(directory)
        tensors = load_file(directory / "model.safetensors")
        table = tensors.pop("model.embed_tokens.weight")
        tensors |= {name: table.clone() for name in names}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        actual = pool.run(logits_of, 2, directory)[0]
        assert_same_logits(actual, expected)


def logits_of(directory: Path) -> Tensor | None:
    trainer = make_trainer(Layout(tensor=2), directory)
    load_pretrained(directory, trainer)
    return whole_logits(trainer, collate([samples()[1]]))
