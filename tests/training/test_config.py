"""Settings out of YAML: every key checked, every mistake named."""

import pytest
import yaml

from vdr_db.errors import ConfigError
from vdr_db.training.config import build_config, load_config, preset_folder
from vdr_db.training.settings import TrainConfig


def test_a_file_with_relative_paths_and_overrides(tmp_path):
    (tmp_path / "pairs.tsv").write_text("q\tp\n")
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {start: some/model, k: null}\n"
        "data: {train: [{path: pairs.tsv}]}\n"
        "optimiser: {lr: 2e-5, betas: [0.9, 0.98]}\n"
    )
    config = load_config(file, {"run.steps": "300", "loss.symmetry": "none"})
    assert config.data.train[0].path == str(tmp_path / "pairs.tsv")
    assert config.model.start == "some/model"
    assert config.model.k is None
    assert config.optimiser.lr == 2e-5
    assert config.optimiser.betas == (0.9, 0.98)
    assert (config.run.steps, config.loss.symmetry) == (300, "none")
    assert build_config(config.to_dict()) == config
    assert build_config(yaml.safe_load(yaml.safe_dump(to_plain(config.to_dict())))) == config


def to_plain(value):
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle": {}}, "unknown key `modle`"),
        ({"model": {"head": "dense"}}, r"`model.head` must be one of"),
        ({"model": {"kk": 1}}, r"unknown key `model.kk`; expected some of start, head"),
        ({"model": {"k": "many"}}, r"`model.k` must be of type int, got 'many'"),
        ({"run": {"steps": True}}, r"`run.steps` must be of type int"),
        ({"run": {"steps": 1.5}}, r"`run.steps` must be of type int"),
        ({"data": {"train": "pairs.tsv"}}, r"`data.train` must be a list"),
        ({"data": {"train": [{"file": "x"}]}}, r"unknown key `data.train\[0\].file`"),
        ({"optimiser": {"betas": [0.9]}}, r"`optimiser.betas` must be a list of 2"),
        ({"optimiser": {"lr": "fast"}}, r"`optimiser.lr` must be of type float"),
        ({"loss": {"temperature": 0}}, r"`loss.temperature` must be above 0"),
        ({"run": {"batch_size": 0}}, r"`run.batch_size` must be above 0"),
        ({"run": {"epochs": 0}}, "got 0 for both"),
        ({"optimiser": {"warmup_steps": -1}}, "must not be negative"),
        ({"loss": {"objective": "dpr", "kl": 1.0}}, "takes no teachers"),
        ({"model": [1]}, "`model` must be a section"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(settings)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="YAML file or one of the presets"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(ConfigError, match="must be YAML"):
        load_config(broken)
    broken.write_text("3")
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(broken)


@pytest.mark.parametrize("name", sorted(path.stem for path in preset_folder().glob("*.yaml")))
def test_presets_are_whole(name):
    config = load_config(name)
    assert isinstance(config, TrainConfig)
    assert config.data.train, "a preset says where its data is expected"
