"""What scripts say of names that lead nowhere."""

import pytest

from training.cli.arguments import check_source


@pytest.mark.parametrize("name", ["outputs/nope", "hub_cards/nope", "./nope", "../a/b", "/nope", "a/b/c", "nope"])
def test_folders_that_are_not_there_are_named(name, tmp_path, monkeypatch):
    for folder in ("outputs", "hub_cards"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} is neither a local folder nor a Hub id"):
        check_source(name)


def test_folders_and_hub_ids_are_taken(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("outputs/demo", "outputs", str(tmp_path), "HuggingFaceTB/SmolVLM-256M-Instruct"):
        check_source(name)
