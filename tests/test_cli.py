import pytest

from mask_llava_hf import ObjectStore
from mask_llava_hf.cli import main


def precompute(*arguments) -> list[str]:
    return ["precompute", *map(str, arguments)]


def test_precompute_prints_what_it_did(tiny_checkpoint, photo, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    photo.save(tmp_path / "images/photo.png")
    (tmp_path / "images/bad.png").write_text("no image")
    command = precompute(tmp_path / "images", tmp_path / "store", "--checkpoint", tiny_checkpoint, "--device", "cpu")
    assert main([*command, "--max-object-tokens", "2", "--dtype", "float32"]) == 0
    expected = "stored 1 images with 2 objects; 0 were there already; skipped 1, see "
    assert expected in capsys.readouterr().out
    assert len(ObjectStore.open(tmp_path / "store").get(photo)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--max-object-tokens": "3"}, "max_object_tokens=2, but now it is 3"),
        ({"--max-object-tokens": "-1"}, "max_object_tokens"),
        ({"source": "nothing.json"}, "There is no file 'nothing.json'"),
        ({"--checkpoint": "no/such/checkpoint"}, "no/such/checkpoint"),
        ({"--detector": "./no-such-part"}, "no-such-part"),
    ],
)
def test_what_the_user_can_mend_is_told_without_a_traceback(tiny_checkpoint, photo, tmp_path, capsys, changes, message):
    (tmp_path / "images").mkdir()
    photo.save(tmp_path / "images/photo.png")
    options = {"source": tmp_path / "images", "--checkpoint": tiny_checkpoint, "--max-object-tokens": 2}

    def command(changes):
        source, *pairs = {**options, **changes}.items()
        return precompute(source[1], tmp_path / "store", *[word for pair in pairs for word in pair])

    assert main(command({})) == 0
    capsys.readouterr()
    assert main(command(changes)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mask-llava: error: " in captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err
    with pytest.raises((ValueError, OSError)):
        main(["--debug", *command(changes)])


def test_interruption_is_no_error(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mask_llava_hf.precompute.precompute_objects", interrupt)
    assert main(precompute(tmp_path, tmp_path / "store", "--checkpoint", tiny_checkpoint)) == 130
    assert capsys.readouterr().err.endswith("mask-llava: interrupted\n")


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert {"precompute", "convert", "bench"} <= {line.split()[0] for line in said.splitlines() if line.strip()}
