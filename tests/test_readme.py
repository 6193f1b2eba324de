"""The README's programs run and print what it says; its tables name what is there."""

import re
import runpy

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "transformer_model.py").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: text.splitlines()[0])
def test_program_prints_what_the_readme_says(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    runpy.run_path(str(path))
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.+)$", program, re.MULTILINE)
    assert promised and printed == promised


def test_there_are_two_programs():
    assert len(PROGRAMS) == 2


def test_sections_of_the_map_are_those_of_the_file():
    sections = re.findall(r"^# ---- (\d+ .*?) -+$", SOURCE, re.MULTILINE)
    assert len(sections) == 16
    assert sections[:10] == re.findall(r"^\| (\d+ .*?) \|", README, re.MULTILINE)[:10]


def test_names_of_the_map_are_in_their_sections():
    parts = re.split(r"^# ---- \d+ .*$", SOURCE, flags=re.MULTILINE)
    rows = re.findall(r"^\| (\d+) (?!to).*? \| (.*?) \|", README, re.MULTILINE)
    assert len(rows) == 10
    for number, holds in rows:
        for name in re.findall(r"`(\w+)`", holds):
            assert re.search(
                rf"^(def|class) {name}\b", parts[int(number)], re.MULTILINE
            ), name


def test_places_of_the_table_are_those_that_what_breaks_changes():
    what_breaks = runpy.run_path(str(ROOT / "tests" / "measure" / "what_breaks.py"))
    found = 0
    for name, old, new, *_ in what_breaks["CHANGES"]:
        place = what_breaks["changed_function"](old) if old else new
        rows = re.findall(
            rf"^{re.escape(name)}  +(\S+(?: \S+)?)  ", README, re.MULTILINE
        )
        assert rows in ([], [place]), name
        found += len(rows)
    assert found >= 10
