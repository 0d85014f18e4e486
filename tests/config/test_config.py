"""Settings: what is right round-trips, what is wrong is one line that says where, what and what else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm3d.config import config_to_yaml, kind_of, load_config, make_config, with_vocab_size
from llm3d.config.presets import PRESETS
from llm3d.errors import InputError
from tests.config.sections import SECTIONS

ROOT = Path(__file__).parent.parent.parent
# Degrees of 2, 3 and 4 each fit something here, and none fits everything.
SETTINGS = """
run: {dir: runs/test}
model: {vocab_size: 96, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 12,
        num_attention_heads: 8, num_key_value_heads: 4}
data: {train: [corpus/train], valid: [corpus/valid], sequence_length: 30}
batch: {global: 24, micro: 1}
optim: {lr: 1e-3}
train: {steps: 100}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return written(tmp_path, SETTINGS)


def written(directory: Path, text: str | bytes) -> Path:
    path = directory / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(path: Path, overrides: str = "", world_size: int | None = 1) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides.split("; ") if overrides else [], world_size)
    return str(caught.value)


# ---- what is right ----


def test_defaults_that_follow_from_other_settings(settings: Path) -> None:
    config = load_config(settings)
    assert config.model.head_dim == 6
    assert config.optim.min_lr == 1e-4
    assert config.data.train[0].path == "corpus/train"
    assert config.data.train[0].weight == 1.0
    assert load_config(settings, ["optim.schedule=wsd"]).optim.decay_steps is None, "a tenth of any run"
    assert load_config(settings, ["optim.schedule=wsd", "optim.decay_steps=7"]).optim.decay_steps == 7


def test_overrides_replace_what_they_name(settings: Path) -> None:
    overrides = [
        "parallel.tensor=2",
        "optim.lr=6e-4",
        "train.steps=2e3",
        "data.train=a",
        "data.valid=[b, {path: c}]",
    ]
    config = load_config(settings, overrides, world_size=2)
    assert config.parallel.tensor == 2
    assert config.optim.lr == 6e-4
    assert config.train.steps == 2000
    assert [source.path for source in (*config.data.train, *config.data.valid)] == ["a", "b", "c"]
    assert load_config(settings, ["data.train.0.path=x"]).data.train[0].path == "x"
    assert load_config(settings, ["optim.clip_grad_norm=null"]).optim.clip_grad_norm is None
    assert load_config(settings, ["train.steps=5", "train.steps=6"]).train.steps == 6


def test_one_setting_may_be_taken_from_another(settings: Path) -> None:
    assert load_config(settings, ["optim.warmup_steps=${train.steps}"]).optim.warmup_steps == 100


def test_a_step_is_the_same_sequences_on_any_number_of_ranks(settings: Path) -> None:
    config = load_config(settings, ["parallel.tensor=2", "parallel.pipeline=3"], world_size=12)
    assert config.data_parallel_size(12) == 2
    for world_size in (6, 12, 24):
        sequences = config.num_microbatches(world_size) * config.batch.micro
        assert sequences * config.data_parallel_size(world_size) == config.batch.global_size


def test_the_tokenizer_may_give_the_vocabulary_size(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    config = load_config(settings, ["model.vocab_size=null", f"data.tokenizer={tmp_path}/tokenizer.model"])
    assert config.model.vocab_size is None
    assert with_vocab_size(config, 96) == load_config(
        settings, [f"data.tokenizer={tmp_path}/tokenizer.model"]
    )


def test_a_preset_on_the_command_line_replaces_the_model_section(settings: Path) -> None:
    alone = load_config(settings, ["model={preset: llama-tiny, vocab_size: 500}"]).model
    assert load_config(settings, ["model.vocab_size=500", "model.preset=llama-tiny"]).model == alone


def test_fields_beside_a_preset_replace_its_own(settings: Path) -> None:
    model = load_config(settings, ["model={preset: llama-2-7b, num_hidden_layers: 3}"]).model
    assert (model.num_hidden_layers, model.hidden_size) == (3, 4096)


# ---- round trip ----

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
PATHS = st.one_of(TEXT, st.sampled_from(["1e3", "null", "${x}", "\\${x}", "a\\", "~", "2020-01-01", "yes"]))
SIZES = st.integers(1, 4)
POSITIVE = st.floats(1e-30, 1e30)


@st.composite
def settings_that_fit(draw: st.DrawFn) -> dict[str, object]:
    kv_heads, group, head_dim, stages = draw(SIZES), draw(SIZES), 2 * draw(SIZES), draw(SIZES)
    heads = kv_heads * group
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    lr = draw(POSITIVE)
    return {
        "run": {"dir": draw(PATHS), "seed": draw(st.integers(0, 2**63 - 1))},
        "model": {
            "vocab_size": draw(SIZES),
            "hidden_size": heads * draw(SIZES),
            "intermediate_size": draw(SIZES),
            "num_hidden_layers": stages,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rope_theta": draw(POSITIVE),
            "rope_scaling": draw(
                st.sampled_from(
                    [
                        None,
                        {"type": "linear", "factor": 2.0},
                        {"rope_type": "llama3", "factor": 8.0} | scaling,
                    ]
                )
            ),
            "eos_token_id": draw(st.one_of(st.none(), SIZES, st.lists(SIZES, min_size=1))),
        },
        "parallel": {"pipeline": stages, "layers_per_stage": draw(st.sampled_from([None, [1] * stages]))},
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
        "data": {
            "train": draw(
                st.lists(st.one_of(PATHS, st.builds(source, PATHS, POSITIVE)), min_size=1, max_size=3)
            ),
            "sequence_length": 8,
        },
        "batch": {"global": 8, "micro": draw(st.sampled_from([1, 2, 4, 8]))},
        "optim": {"lr": lr, "min_lr": lr * draw(st.floats(0, 1)), "betas": [draw(st.floats(0, 0.9)), 0.5]},
        "train": {"steps": 10},
    }


def source(path: str, weight: float) -> dict[str, object]:
    return {"path": path, "weight": weight}


@given(given_settings=settings_that_fit())
def test_printed_settings_load_as_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, given_settings: dict[str, object]
) -> None:
    config = make_config(given_settings, world_size=None)
    path = written(tmp_path_factory.getbasetemp(), config_to_yaml(config))
    assert load_config(path, world_size=None) == config


def test_settings_cannot_be_changed_afterwards(settings: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(settings).optim.lr = 1.0


# ---- what is wrong: the file ----

FILES = {
    "run: {dir: a}\nrun: {dir: b}\n": "config.yaml, line 2, column 1: duplicate key run",
    "run:\n  dir: a\n  seed: 1\n  dir: b\n": "config.yaml, line 4, column 3: duplicate key dir",
    "a: [1, 2\n": "config.yaml, line 2, column 1: ",
    "run:\n\tdir: x\n": "config.yaml, line 2, column 1: found character '\\t'",
    "a: 1\n---\nb: 1\n": "config.yaml, line 2, column 1: ",
    "": "config.yaml: no settings in it",
    "# nothing\n": "config.yaml: no settings in it",
    "- 1\n- 2\n": "config.yaml: a list; it must be sections",
    "hello": "config.yaml: a single value; it must be sections",
    "run: caf\xe9".encode("latin-1"): "config.yaml: not UTF-8 text (byte 8 of the file)",
    b"\x00\x01\x02": "config.yaml: not YAML: ",
    "null: 3": "config.yaml: top level: ",
    "run: {dir: '${x'}": "config.yaml: run.dir: ",
    "run: {dir: '${x}'}": "run.dir: Interpolation key 'x' not found",
    "run: {dir: '${run.dir}'}": "run.dir: Recursive interpolation",
    "a: &x [*x]": "config.yaml, line 1, column 4: ",
    "a: " + "[" * 5000: "config.yaml: nested too deeply",
    "a: !!python/object:os.system {}": "config.yaml, line 1, column 4: could not determine a constructor",
}


@pytest.mark.parametrize(("text", "said"), FILES.items(), ids=range(len(FILES)))
def test_a_file_that_is_not_settings(tmp_path: Path, text: str | bytes, said: str) -> None:
    message = complaint(written(tmp_path, text))
    assert said in message
    assert "\n" not in message


@given(noise=st.binary())
def test_no_file_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    assert complaint(written(tmp_path_factory.getbasetemp(), noise))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert complaint(tmp_path / "nothing.yaml") == f"{tmp_path}/nothing.yaml: no such file or directory"
    assert complaint(tmp_path) == f"{tmp_path}: a directory; give the YAML file in it"


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    message = complaint(written(tmp_path, "run:\nlog: {tensorboard: false}\n"))
    missing = ["run.dir", "data.train", "data.sequence_length", "batch.global", "optim.lr", "train.steps"]
    expected = {f"{path}: missing" for path in missing} | {"model: missing; give its preset, path or sizes"}
    assert set(message.splitlines()) == expected


# ---- what is wrong: a setting ----

# What is wrong: the setting that the message begins with, and a word that tells this fault from others.
OVERRIDES = {
    # zero and precision
    "zero.stage=4": ("zero.stage", "3"),
    "zero.offload=all": ("zero.offload", "optimizer"),
    "zero.offload_fraction=0.5": ("zero.offload_fraction", "zero.offload"),
    "precision.gradients=bf16": ("precision.gradients", "precision.compute"),
    "precision.loss_scale.hysteresis=1": ("precision.loss_scale", "precision.compute"),
    "zero.prefetch=2": ("zero.prefetch", "zero.stage"),
    "precision={compute: fp16, loss_scale: {initial: 0.5}}": (
        "precision.loss_scale.initial",
        "precision.loss_scale.minimum",
    ),
    # not an override
    "foo": ("override 'foo'", "section.key=value"),
    "a.b": ("override 'a.b'", "section.key=value"),
    "a.b=": ("override 'a.b='", "null"),
    "=3": ("override '=3'", "''"),
    "a..b=3": ("override 'a..b=3'", "'a..b'"),
    "a.b=[1,2": ("override 'a.b=[1,2'", "']'"),
    "a.b=${": ("override 'a.b=${'", ""),
    "data.train.5.path=x": ("override 'data.train.5.path=x'", "list"),
    "data.train.x=5": ("override 'data.train.x=5'", "list"),
    # unknown names
    "paralel.tensor=2": ("paralel", "parallel"),
    "parallel.tensr=2": ("parallel.tensr", "parallel.tensor"),
    "tensor=2": ("tensor", "parallel.tensor"),
    "model.seed=2": ("model.seed", "run.seed"),
    "model.presets=x": ("model.presets", "model.preset"),
    "batch.global_size=3": ("batch.global_size", "batch.global"),
    "data.train=[{path: a, wight: 2}]": ("data.train[0].wight", "data.train[0].weight"),
    "batch.zebra=1": ("batch.zebra", "micro"),
    # wrong types and ranges
    "parallel.tensor=0": ("parallel.tensor", "below"),
    "parallel.tensor=two": ("parallel.tensor", "whole number"),
    "parallel.tensor='2'": ("parallel.tensor", "whole number"),
    "parallel.tensor=2.5": ("parallel.tensor", "whole number"),
    "parallel.tensor=true": ("parallel.tensor", "whole number"),
    "parallel.sequence=1": ("parallel.sequence", "false"),
    "parallel.schedule=1f1": ("parallel.schedule", "1f1b"),
    "recompute=some": ("recompute", "full"),
    "precision.compute=fp64": ("precision.compute", "fp16"),
    "run.dir=5": ("run.dir", "quotes"),
    "run.dir=''": ("run.dir", "empty"),
    "run.seed=-1": ("run.seed", "below"),
    "optim.lr=0": ("optim.lr", "not above"),
    "optim.lr=.nan": ("optim.lr", "finite"),
    "optim.lr=fast": ("optim.lr", "number"),
    "optim.betas=[1,0]": ("optim.betas[0]", "not below"),
    "optim.betas=[0.9]": ("optim.betas[1]", "missing"),
    "optim.betas=0.9": ("optim.betas", "list"),
    "optim=5": ("optim", "section"),
    "data.train=[]": ("data.train", "1"),
    "data.train=5": ("data.train", "list"),
    "data.train=[{path: a, weight: -1}]": ("data.train[0].weight", "not above"),
    "train.steps=.inf": ("train.steps", "whole number"),
    "train.steps=null": ("train.steps", "whole number"),
    "model.eos_token_id=[1,-2]": ("model.eos_token_id[1]", "below"),
    # the model
    "model.preset=llama-2-7": ("model.preset", "llama-2-7b"),
    "model={preset: llama-tiny, path: x}": ("model", "exclude"),
    "model.path=nowhere": ("model.path", "directory"),
    "model.preset=llama-tiny": ("model.vocab_size", "missing"),
    "model={preset: llama-2-7b, num_attention_heads: 6}": ("model.num_attention_heads", "model.hidden_size"),
    "model.num_key_value_heads=3": ("model.num_key_value_heads", "model.num_attention_heads"),
    "model.head_dim=7": ("model.head_dim", "even"),
    "model.rope_scaling={type: yarn, factor: 2}": ("model.rope_scaling", "llama3"),
    "model.rope_scaling={type: llama3, factor: 2}": ("model.rope_scaling", "needs low_freq_factor"),
    "model.rope_scaling={type: linear, factor: 2, low_freq_factor: 1}": (
        "model.rope_scaling",
        "takes no low_freq_factor",
    ),
    # settings that do not fit each other
    "data.sequence_length=4096": ("data.sequence_length", "model.max_position_embeddings"),
    "data.tokenizer=nowhere": ("data.tokenizer", "nowhere"),
    "checkpoint.resume=atuo": ("checkpoint.resume", "auto"),
    "optim.min_lr=1": ("optim.min_lr", "optim.lr"),
    "optim.decay_steps=5": ("optim.decay_steps", "optim.schedule"),
    "optim.decay_ratio=0.1": ("optim.decay_ratio", "optim.schedule"),
    "optim.warmup_ratio=0.1; optim.warmup_steps=5": ("optim.warmup_ratio", "optim.warmup_steps"),
    "optim.decay_ratio=0.1; optim.decay_steps=5; optim.schedule=wsd": (
        "optim.decay_ratio",
        "optim.decay_steps",
    ),
    "optim.warmup_ratio=0.6; optim.decay_ratio=0.5; optim.schedule=wsd": ("optim.warmup_ratio", "above"),
    "checkpoint.best=valid_loss; train.eval_every=null": ("checkpoint.best", "train.eval_every"),
    "checkpoint.greater_is_better=true": ("checkpoint.greater_is_better", "checkpoint.best"),
    "train.patience=3": ("train.patience", "checkpoint.best"),
    "train.eval_every=5; data.valid=[]": ("train.eval_every", "data.valid"),
}


@pytest.mark.parametrize(("override", "named"), OVERRIDES.items(), ids=OVERRIDES)
def test_a_setting_that_is_wrong(settings: Path, override: str, named: tuple[str, str]) -> None:
    message, (setting, keyword) = complaint(settings, override), named
    assert message.startswith(setting) and keyword in message.removeprefix(setting)
    assert "\n" not in message


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=4,
)
NAMES = [f"{section}.{name}" for section, names in SECTIONS.items() for name in names] + list(SECTIONS)


@given(name=st.sampled_from(NAMES), value=VALUES)
def test_no_value_of_any_setting_ends_in_a_traceback(name: str, value: object) -> None:
    settings = yaml.safe_load(SETTINGS.replace("1e-3", "0.001"))
    section, _, key = name.partition(".")
    if key:
        settings.setdefault(section, {})[key] = value
    else:
        settings[section] = value
    try:
        made: object = make_config(settings)
    except InputError as error:
        made = str(error)
    assert made, "settings, or a message"


LAYOUTS = {
    ("parallel.tensor=3", 3): ("parallel.tensor", "model.num_attention_heads"),
    ("parallel.tensor=4; model.intermediate_size=90", 4): ("parallel.tensor", "model.intermediate_size"),
    ("parallel.tensor=4; parallel.sequence=true", 4): ("parallel.sequence", "30"),
    ("parallel.pipeline=13", 13): ("parallel.pipeline", "model.num_hidden_layers"),
    ("parallel.chunks=2", 1): ("parallel.chunks", "parallel.schedule"),
    ("parallel.schedule=interleaved; parallel.chunks=2", 1): ("parallel.schedule", "parallel.pipeline"),
    ("parallel.pipeline=2; parallel.layers_per_stage=[12]", 2): (
        "parallel.layers_per_stage",
        "parallel.chunks",
    ),
    ("parallel.pipeline=2; parallel.layers_per_stage=[5, 8]", 2): (
        "parallel.layers_per_stage",
        "model.num_hidden_layers",
    ),
    ("parallel.pipeline=2; parallel.layers_per_stage=[0, 12]", 2): ("parallel.layers_per_stage[0]", "below"),
    ("parallel.tensor=2; parallel.pipeline=3", 8): ("world size", "6"),
    ("batch.micro=2", 8): ("batch.global", "batch.micro"),
    ("parallel.pipeline=3; parallel.chunks=2; parallel.schedule=interleaved; batch.micro=6", 3): (
        "parallel.schedule",
        "batch.micro",
    ),
}


@pytest.mark.parametrize(("layout", "named"), LAYOUTS.items(), ids=str)
def test_a_layout_that_does_not_fit(settings: Path, layout: tuple[str, int], named: tuple[str, str]) -> None:
    message, (setting, keyword) = complaint(settings, *layout), named
    assert message.startswith(setting) and keyword in message.removeprefix(setting)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ("parallel.tensor=8", 8),  # 4 key/value heads, each on two ranks
        ("parallel.tensor=2; parallel.sequence=true", 4),
        ("parallel.sequence=true", 1),
        ("parallel.pipeline=5", 5),
        ("parallel.pipeline=2; parallel.layers_per_stage=[5, 7]", 4),
        ("parallel.pipeline=3; parallel.chunks=4; parallel.schedule=interleaved", 3),
    ],
)
def test_a_layout_that_fits(settings: Path, layout: str, world_size: int) -> None:
    config = load_config(settings, layout.split("; "), world_size)
    ranks = config.parallel.tensor * config.parallel.pipeline * config.data_parallel_size(world_size)
    assert ranks == world_size and config.num_microbatches(world_size) >= 1


# ---- models from a Hugging Face directory ----


def model_directory(directory: Path, **changes: object) -> Path:
    stored = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
    } | changes
    (directory / "config.json").write_text(json.dumps(stored))
    return directory


def test_a_model_directory_gives_the_shape_and_says_it_again(settings: Path, tmp_path: Path) -> None:
    directory = model_directory(tmp_path, eos_token_id=[1, 2], num_key_value_heads=None)
    config = load_config(settings, [f"model.path={directory}"])
    assert config.model.path == str(directory)
    assert (config.model.head_dim, config.model.num_key_value_heads) == (16, 4)
    assert config.model.eos_token_id == (1, 2)
    assert load_config(written(tmp_path, config_to_yaml(config))) == config


def test_old_and_new_rope_settings_mean_the_same(settings: Path, tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    forms = [
        {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}},
        {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}},
    ]
    models = []
    for form in forms:
        model_directory(tmp_path, **form)
        models.append(load_config(settings, [f"model.path={tmp_path}"]).model)
    assert models[0] == models[1] == models[2]
    model_directory(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    plain = load_config(settings, [f"model.path={tmp_path}"]).model
    assert plain == models[0].model_copy(update={"rope_scaling": None})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "has model_type 'mistral'; supported are 'llama', 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"hidden_size": "64"}, "model.hidden_size: '64' is not a whole number (in "),
    ],
)
def test_a_model_directory_that_cannot_be_trained(
    settings: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    model_directory(tmp_path, **change)
    assert said in complaint(settings, f"model.path={tmp_path}")


def test_a_shape_beside_a_model_directory_must_agree(settings: Path, tmp_path: Path) -> None:
    model_directory(tmp_path)
    assert "128 is not what" in complaint(
        settings, f"model={json.dumps({'path': str(tmp_path), 'hidden_size': 128})}"
    )
    assert (
        load_config(
            settings, [f"model={json.dumps({'path': str(tmp_path), 'pad_token_id': 3})}"]
        ).model.pad_token_id
        == 3
    )
    assert "config.json: no such file" in complaint(settings, f"model.path={tmp_path.parent}")
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in complaint(settings, f"model.path={tmp_path}")


# ---- files that come with llm3d ----


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_load_on_the_devices_that_they_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text()
    devices = re.search(r"Devices: (\d+)", text)
    assert devices
    monkeypatch.chdir(tmp_path)
    sections = yaml.safe_load(text)
    if tokenizer := sections["data"].get("tokenizer"):
        Path(tokenizer).mkdir(parents=True)
    if model := sections["model"].get("path"):
        shape = PRESETS["llama-20m"] | {"vocab_size": 1000, "model_type": "llama"}
        Path(model).mkdir(parents=True)
        (Path(model) / "config.json").write_text(json.dumps(shape))
    load_config(path, (), int(devices[1]), kind_of(path))


def test_the_schema_names_every_setting_that_loads(settings: Path) -> None:
    resolved = load_config(settings).model_dump(by_alias=True)
    assert set(SECTIONS) == set(resolved)
    for name, section in resolved.items():
        if isinstance(section, dict):
            assert set(SECTIONS[name]) - {"preset"} == set(section)
