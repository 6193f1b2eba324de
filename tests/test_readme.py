"""The README's programs run, and do what it says they do."""

import re
import runpy
import sys

import pytest
import what_breaks
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: text.splitlines()[0])
def test_program_runs_and_prints_what_the_readme_says(
    program, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = (f"{word} {n}\t{word[::-1]}\n" for n in range(20) for word in ("ab", "cde"))
    (tmp_path / "words.tsv").write_text("".join(words))
    path = tmp_path / "program.py"
    path.write_text(program)
    arguments = ["words.tsv", "2"] if "sys.argv" in program else []
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path))
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.+)$", program, re.MULTILINE)
    if arguments:
        assert re.fullmatch(r"\d+\.\d% of \d+ exactly right", printed[0])
    else:
        assert promised and printed == promised


def test_there_are_three_programs():
    assert len(PROGRAMS) == 3


def test_sections_of_the_map_exist():
    source = (ROOT / "transformer_model.py").read_text()
    sections = re.findall(r"^# ---- (\d+) (.*?)(?::.*)? -+$", source, re.MULTILINE)
    assert [int(number) for number, _ in sections] == list(range(1, 16))
    for number, title in sections:
        assert f"| {number} {title} |" in README


def test_places_of_the_table_are_those_that_what_breaks_changes():
    for name, old, new in what_breaks.CHANGES[1:]:
        place = what_breaks.changed_function(old) if old else new
        rows = re.findall(rf"^{re.escape(name)} +(\S+) ", README, re.MULTILINE)
        assert rows and set(rows) == {place}, name
