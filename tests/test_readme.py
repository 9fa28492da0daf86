"""The README's first example runs as it stands, and prints what it says."""

import re
from pathlib import Path


README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_has_its_true_output(tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code, expected = example.groups()
    monkeypatch.chdir(tmp_path)  # it writes a checkpoint
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == expected


def test_pictures_and_files_it_names_exist():
    text = README.read_text(encoding="utf-8")
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for path in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert path.removeprefix("#") in headings if path.startswith("#") else (README.parent / path).exists(), path
    for folder in re.findall(r"^  ([a-z_]+(?:/|\.py)) ", text, re.MULTILINE):
        assert (README.parent / "src/mask_llava_hf" / folder).exists(), folder
