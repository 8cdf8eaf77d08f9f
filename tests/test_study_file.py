from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_transfer.errors import StudyError
from sae_transfer.study_file import load_study, parse_study, parse_study_file, resolved_yaml, set_key

REQUIRED = """\
pair: {base: org/base, chat: org/chat}
site: {layer: 13, hook: resid_pre}
tokens: {dataset: org/text}
"""


def write(directory: Path, text: str = "", name: str = "study.yaml") -> Path:
    path = directory / name
    path.write_text(REQUIRED + text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(StudyError) as caught:
        load_study(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines() if not line.startswith("  try")]


def test_a_study_is_named_after_its_file(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, name="qwen1.5-0.5b.yaml")).name == "qwen1.5-0.5b"
    assert load_study(write(tmp_path, "name: mine")).name == "mine"


def test_numbers_read_as_people_write_them(tmp_path: Path) -> None:
    study = load_study(
        write(tmp_path, "train: {lr: 5e-5, tokens: 1e9, scale_tokens: 98_304}\nevaluate: {tokens: 010000}")
    )
    assert (study.train.lr, study.train.tokens, study.train.scale_tokens) == (5e-5, 10**9, 98_304)
    assert study.evaluate.tokens == 10_000, "a leading zero is no octal number"


def test_words_that_old_yaml_takes_for_other_things_stay_text(tmp_path: Path) -> None:
    text = "name: 2026-11-20\ntracking: {project: off, entity: no}\n"
    study = load_study(write(tmp_path, text))
    assert (study.name, study.tracking.project, study.tracking.entity) == ("2026-11-20", "off", "no")
    assert problems(write(tmp_path, "tracking: {wandb: off}")) == [
        'tracking.wandb: got "off"; expected one of disabled, offline or online'
    ]
    assert problems(write(tmp_path, "finetune: {control: yes}\nsaes: {}")) == [
        'finetune.control: got "yes"; expected true or false'
    ]
    assert problems(write(tmp_path, "name: 007")) == [
        "name: got 7; expected text; a number or true/false is text in quotes"
    ]


def test_repeated_keys_are_refused_with_their_lines(tmp_path: Path) -> None:
    text = (
        "evaluate:\n  tokens: 8192\n  batch_size: 4\n  tokens: 4096\n"
        "saes: [{widths: [8], widths: [16]}]\nevaluate: {tokenz: 3}\n"
    )
    assert problems(write(tmp_path, text)) == [
        "evaluate.tokens: given twice, on lines 5 and 7; expected once",
        "saes[0].widths: given twice, on lines 8 and 8; expected once",
        "evaluate: given twice, on lines 4 and 9; expected once",
        "evaluate.tokenz: unknown key; did you mean tokens?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got nothing; expected keys and values"),
        (b"- a\n", 'got ["a"]; expected keys and values'),
        (b"pair: [", "not readable as YAML"),
        (b"a: 1\nb: c: d\n", "line 2, column 5: not readable as YAML: mapping values are not allowed here"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a: &x {b: 1}\nc: *x\n", "an alias (*); write the value out instead"),
        (b"a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        (b"---\na: 1\n---\nb: 2\n", "expected a single document"),
    ],
)
def test_files_that_are_no_study_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(StudyError, match="cannot be read"):
            load_study(path)


def test_keys_that_are_no_text_are_told_like_others(tmp_path: Path) -> None:
    assert problems(write(tmp_path, "5: 6\ntrue: 1"))[0].startswith("5: unknown key; expected one of name, pair")


def test_overrides_set_any_key(tmp_path: Path) -> None:
    path = write(tmp_path, "saes: [{widths: [8]}, {architecture: topk, k: 4}]\nfinetune: {}\nevaluate:\n")
    overrides = ["evaluate.tokens=8192", "saes.widths=[1024]", "finetune=null", "instruct.n=5", "train.lr=1e-3"]
    study = load_study(path, overrides)
    assert study.evaluate.tokens == 8192
    assert study.train.lr == 1e-3
    assert [spec.name for spec in study.sae_specs()] == ["standard-w1024-l1_3-s0", "topk-w1024-k4-s0"]
    assert study.finetune is None
    assert study.instruct is not None, "an absent section is made"
    assert study.instruct.n == 5
    assert load_study(path, ["saes={widths: 16}", "tokens.column=a=b"]).tokens.column == "a=b"
    assert load_study(write(tmp_path), ["saes.widths=[16]"]).sae_specs()[0].d_sae == 16


def test_wrong_overrides_name_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, "evaluate: {batch_sise: 3}\nexternal_saes: []")
    assert problems(
        path,
        "evaluate.tokenz=5",
        "evaluate.tokens",
        "evaluate.scale=[raw, sideways]",
        "site.layer.x=3",
        "train..lr=3",
        "train.lr=[1",
        "finetune={data: tokens, data: rollouts}",
        "external_saes.path=x",
        "saes={widths: 16, k: 3}",
    ) == [
        "--set evaluate.tokens: expected KEY=VALUE, such as evaluate.tokens=8192",
        "--set site.layer.x=3: site.layer.x: layer holds no keys; expected a mapping there",
        "--set train..lr=3: train..lr: got an empty part; expected a dotted key, such as evaluate.tokens",
        "--set train.lr=[1: line 1, column 3: not readable as YAML: while parsing a flow sequence,"
        " expected ',' or ']', but got '<stream end>'",
        "--set finetune={data: tokens, data: rollouts}: given twice, on lines 1 and 1; expected once",
        "--set external_saes.path=x: external_saes.path: external_saes holds no keys; expected a mapping there",
        '--set evaluate.scale=[raw, sideways]: evaluate.scale[1]: got "sideways"; expected one of matched or raw',
        "evaluate.batch_sise: unknown key; did you mean batch_size?",
        "--set evaluate.tokenz=5: evaluate.tokenz: unknown key; did you mean tokens?",
        "--set saes={widths: 16, k: 3}: saes.k: belongs to topk and batchtopk; the sparsity key of standard is"
        " l1_coefficient",
    ]


def test_a_key_can_be_set_in_a_plain_mapping() -> None:
    mapping: dict[str, Any] = {"saes": [{}, {}]}
    set_key(mapping, "saes.widths", [8])
    set_key(mapping, "site.layer", 3)
    assert mapping == {"saes": [{"widths": [8]}, {"widths": [8]}], "site": {"layer": 3}}


def test_local_paths_are_looked_up_beside_the_file_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "configs", tmp_path / "working"
    for place in (beside / "both", working / "both", working / "org" / "model"):
        place.mkdir(parents=True)
    monkeypatch.chdir(working)
    (working / "text.jsonl").touch()
    study = load_study(
        write(beside),
        [
            "pair.base=both",
            "pair.chat=org/model",
            "tokens.dataset=text.jsonl",
            "instruct.dataset=demo:instructions",
            "external_saes=[{name: x, trained_on: base, path: ../configs/both}]",
        ],
    )
    assert study.pair.base == str(beside / "both")
    assert study.pair.chat == str(working / "org" / "model")
    assert study.tokens.dataset == str(working / "text.jsonl")
    assert study.instruct is not None
    assert study.instruct.dataset == "demo:instructions"
    assert study.external_saes[0].path == str(beside / "both")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(study))
    assert load_study(tmp_path / "resolved.yaml") == study, "it runs from anywhere"


def test_paths_that_lead_nowhere_are_refused_with_the_places_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "configs", tmp_path / "working"
    beside.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)
    path = write(
        beside,
        "instruct: {dataset: /no/such, rollouts: answers}\n"
        "external_saes: [{name: x, trained_on: base, path: a/b}]\nevaluate: {tokenz: 1}",
    )
    assert problems(path, "tokens.dataset=text.jsonl", "pair.base=./model") == [
        f'--set pair.base=./model: pair.base: got "./model"; expected a file or directory, found neither'
        f" {beside}/model nor {working}/model",
        f'--set tokens.dataset=text.jsonl: tokens.dataset: got "text.jsonl"; expected a file or directory, found'
        f" neither {beside}/text.jsonl nor {working}/text.jsonl",
        'instruct.dataset: got "/no/such"; expected a file or directory, found neither /no/such',
        f'instruct.rollouts: got "answers"; expected a file or directory, found neither {beside}/answers nor'
        f" {working}/answers",
        f'external_saes[0].path: got "a/b"; expected a file or directory, found neither {beside}/a/b nor {working}/a/b',
        "evaluate.tokenz: unknown key; did you mean tokens?",
    ]


def test_a_run_directorys_own_file_is_read_wherever_its_paths_lead(tmp_path: Path) -> None:
    path = write(tmp_path, "external_saes: [{name: x, trained_on: base, path: /gone/sae}]")
    assert parse_study_file(path).external_saes[0].path == "/gone/sae"


def test_a_name_too_long_for_a_file_is_a_hub_id(tmp_path: Path) -> None:
    assert load_study(write(tmp_path), ["pair.base=" + "x" * 5000]).pair.base == "x" * 5000


def test_the_resolved_form_loads_back_to_the_same_study(tmp_path: Path) -> None:
    text = """
name: 1e6x
norm_scale: {base: 1.9456, chat: 1.5732}
saes:
  - {widths: [1024, 2048], l1_coefficient: [3, 1.0e-7]}
  - {architecture: batchtopk, widths: 64, k: 8.5}
  - {architecture: jumprelu, widths: 64, l0_coefficient: 0.1}
train: {tokens: 5M}
finetune: {tokens: [0.5M, 1M], data: rollouts, control: true}
evaluate: {tokens: 8192, outlier_threshold: 50, scale: [matched, raw]}
instruct: {template: " [INST] {instruction} [/INST] \\n\\t¶"}
external_saes: [{name: scope-16k, trained_on: base, release: gemma-scope-2b-pt-res-canonical, id: layer_12/canonical}]
"""
    study = load_study(write(tmp_path, text))
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(study), encoding="utf-8")
    assert load_study(path) == study
    assert resolved_yaml(load_study(path)) == resolved_yaml(study)
    resolved = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(resolved) == set(type(study).model_fields), "every section is written out"
    assert resolved["saes"][0]["seeds"] == [0]
    assert "k" not in resolved["saes"][0]


@pytest.mark.parametrize(
    "text", ["off", "no", "1e6", "08", "010", "1:30", "null", "~", "2026-11-20", "true", "3.", "a: b", "é\n"]
)
def test_text_that_looks_like_something_else_survives_the_resolved_form(tmp_path: Path, text: str) -> None:
    sections = {"pair": {"base": "a", "chat": "b", "base_revision": text}, "tokens": {"dataset": "x"}}
    study = parse_study({**sections, "site": {"layer": 0, "hook": "resid_pre"}}, "x")
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(study), encoding="utf-8")
    assert parse_study_file(tmp_path / "resolved.yaml") == study


def test_a_mapping_given_to_be_parsed_is_left_unchanged() -> None:
    mapping = yaml.safe_load(REQUIRED + "evaluate: {tokens: 1, tokenz: 2}")
    before = yaml.safe_dump(mapping)
    with pytest.raises(StudyError):
        parse_study(mapping, "x")
    assert yaml.safe_dump(mapping) == before
