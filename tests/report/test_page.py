import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sae_transfer.errors import StudyError
from sae_transfer.report.page import write_report
from tests.report.runs import TABLES, full_run, make_run, post_rows, row, write_json, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECTIONS = [
    *("verdict", "cross-eval", "outliers", "instruct", "finetune", "weights", "training", "published"),
    *("method", "provenance"),
]
TABLE_NAMES = {
    *("verdict", "cross_eval", "cross_eval_long", "transfer", "equal_l0", "outliers", "outlier_tokens", "thresholds"),
    *("instruct", "instruct_transfer", "instruct_long", "finetune", "finetune_budget", "weights", "activations"),
}


class Page(HTMLParser):
    """The parts of a page that tests look at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self._words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self._words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(of["id"] or "")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self._words += data.split()


def test_a_full_run_has_every_section_and_misses_nothing(reported: Path) -> None:
    page = Page(reported / "report/index.html")
    assert page.sections == SECTIONS
    assert page.tags.count("img") == 14
    assert "CONFIG" not in page.text


def test_the_page_needs_nothing_but_itself(reported: Path) -> None:
    text = (reported / "report/index.html").read_text()
    page = Page(reported / "report/index.html")
    assert all(source.startswith(("#", "data:image/svg+xml;base64,")) for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)


def test_every_table_is_written_as_csv_markdown_and_latex(reported: Path) -> None:
    found = {path.name for path in (reported / TABLES).iterdir()}
    assert found == {f"{name}{suffix}" for name in TABLE_NAMES for suffix in (".csv", ".md", ".tex")}


def test_the_verdict_stands_first_with_its_rule_for_each_direction_and_policy(reported: Path) -> None:
    text = Page(reported / "report/index.html").text
    assert "base SAE on chat model transfers (all 6 SAEs) outliers excluded, matched scale" in text
    assert "does not transfer (all 6 SAEs) outliers kept, matched scale" in text
    assert "lies below 0.05 nats (report.margin), or below the seed noise floor" in text
    assert text.index("chat SAE on base model") < text.index("Cross-evaluation at blocks.16")
    assert "No second seed" not in text


def test_words_confounds_and_provenance_are_given(reported: Path) -> None:
    text = Page(reported / "report/index.html").text
    for said in (
        "6 SAEs for each of base and chat: standard, width 1,024, l1_coefficient 2, 4, 8, 2 seeds",
        "chat model's raw activations are 0.12 times as long",
        "100 instructions drawn, 44 with an input dropped",
        "Threshold: auto: no position of either model",
        "resamples of whole sequences, of which there are 48",
        "Here the factors differ 8.34-fold",
        "git.commit 859bb67",
        "models.base.revision abc123",
        "token_set.fingerprint 0188b22f",
        "command sae-transfer run toy.yaml",
        "stage cross-eval finished 2026-01-01T00:03:00+00:00, 31.5 s",
    ):
        assert said in text
    for confound in ("CE recovered flatters", "L0 differs", "seeds", "scale"):
        assert f"Confound: {confound}" in text


def test_a_missing_stage_is_one_line_with_the_verb_that_makes_it(tmp_path: Path) -> None:
    write_study(tmp_path, instruct=None)
    write_report(make_run(tmp_path, post_rows()))
    page = Page(tmp_path / "report/index.html")
    assert page.sections == SECTIONS
    for line in (
        "Outliers have not been looked at: sae-transfer outliers CONFIG.",
        "sae-transfer instruct CONFIG, once the study file has a section instruct.",
        "No base SAE has been fine-tuned: sae-transfer finetune CONFIG.",
        "The models' weights have not been compared: sae-transfer weights CONFIG.",
        "No SAE was trained in this run: sae-transfer train CONFIG.",
        "nothing is published to compare with",
        "No second seed was evaluated beside the first, so the noise floor is not known.",
    ):
        assert line in page.text


def test_training_alone_is_reported_with_what_is_to_do(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    for stage in ("cross_eval", "outliers", "instruct", "weights"):
        shutil.rmtree(run / stage)
    write_report(run)
    text = Page(run / "report/index.html").text
    assert text.count("The SAEs have not been evaluated on both models: sae-transfer cross-eval CONFIG.") == 2
    assert "Fine-tuned SAEs have not been evaluated: sae-transfer cross-eval CONFIG." in text


def test_saes_without_counterpart_have_no_verdict(tmp_path: Path) -> None:
    write_report(
        make_run(tmp_path, [row("base", "chat", sae="<b>mine</b>", seed="", sparsity_key="", sparsity_value="")], [])
    )
    text = (tmp_path / "report/index.html").read_text()
    assert "there is nothing to judge" in text
    assert "<b>mine" not in text
    assert "&lt;b&gt;mine" in text


def test_a_run_without_any_result_names_the_verb(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StudyError, match=r"no results to report[^$]*sae-transfer cross-eval CONFIG"):
            write_report(run)
    write_study(tmp_path)
    write_json(tmp_path / "scales.json", {"base": 0.3, "chat": 0.3})
    with pytest.raises(StudyError, match="sae-transfer cross-eval CONFIG"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_file_that_was_cut_short_is_refused_with_the_verb_that_writes_it(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    (run / "outliers/scatter.csv").write_text("model,sae\n")
    with pytest.raises(StudyError, match=r"scatter\.csv: lacks the columns[^$]*sae-transfer outliers CONFIG --force"):
        write_report(run)


def test_the_report_is_made_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sae_transfer.report.page import write_report;"
        "write_report(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    run = make_run(tmp_path, post_rows())
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False).returncode == 0
    assert (run / "report" / "index.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_opens_in_a_browser_with_its_tables_and_every_image_loaded(reported: Path, tmp_path: Path) -> None:
    # A copy elsewhere: the page must not need the files beside it.
    page = tmp_path / "alone.html"
    # Only here: what the browser itself says of the images.
    seen = (
        "<script>onload = () => { document.title += ' | ' + "
        "[...document.images].filter(i => i.naturalWidth > 100).length + ' images | ' + "
        "document.querySelector('#cross-eval td').offsetWidth }</script>"
    )
    page.write_text((reported / "report/index.html").read_text() + seen)
    command = [
        *(CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{page}"),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    name, images, width = title[1].split(" | ")
    assert name == "SAE transfer: toy"
    assert images == "14 images"
    assert int(width) > 20
    assert dom.count("<table>") > 20


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_every_latex_table_compiles_and_none_leaves_the_page(reported: Path, tmp_path: Path) -> None:
    inputs = "".join(rf"\input{{{path}}}\clearpage" for path in sorted((reported / TABLES).glob("*.tex")))
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "document.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "Overfull \\hbox" not in result.stdout
    assert "Float too large" not in result.stdout
