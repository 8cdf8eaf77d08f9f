import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

from sae_transfer.config import (
    SAESpec,
    Site,
    Study,
    json_schema,
    number_fields,
    require_saes,
    study_hash,
)
from sae_transfer.errors import StudyError
from sae_transfer.study_file import parse_study

REQUIRED: dict[str, Any] = {
    "pair": {"base": "org/base", "chat": "org/chat"},
    "site": {"layer": 13, "hook": "resid_pre"},
    "tokens": {"dataset": "org/text"},
}


def study(**sections: Any) -> Study:
    return parse_study({**REQUIRED, **sections}, "study.yaml")


def problems(**sections: Any) -> list[str]:
    with pytest.raises(StudyError) as caught:
        study(**sections)
    *lines, remedy = str(caught.value).splitlines()
    assert remedy == "  try: mend this, then: sae-transfer check study.yaml"
    return [line.removeprefix("study.yaml: ") for line in lines]


def test_only_pair_site_and_tokens_are_required_and_the_rest_is_the_posts() -> None:
    plain = study()
    assert plain.saes is None
    assert plain.finetune is None
    assert plain.instruct is None
    assert plain.external_saes == ()
    assert plain.train.model_dump() == {
        "models": ("base", "chat"),
        "tokens": 400_000_000,
        "batch_size": 4096,
        "lr": 5e-5,
        "lr_decay": 0.2,
        "l1_warmup": 0.05,
        "scale_tokens": 4_000_000,
        "drop_norm_above": None,
    }
    assert (plain.evaluate.tokens, plain.evaluate.outlier_threshold) == (98_304, "auto")
    assert problems(pair=None, site=None, tokens=None) == [
        "pair: missing; expected: The two models: base and chat.",
        "site: missing; expected: The layer and hook point.",
        "tokens: missing; expected: The text for training and evaluation.",
    ]


def test_an_empty_section_takes_its_defaults() -> None:
    assert study(evaluate=None, saes=None, external_saes=None) == study()
    assert study(instruct={}).instruct is not None


def test_a_site_is_named_as_in_transformer_lens() -> None:
    assert study().site.hook_name == "blocks.13.hook_resid_pre"
    assert Site(layer=0, hook="attn_out").hook_name == "blocks.0.hook_attn_out"


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("5M", 5_000_000),
        ("800M", 800_000_000),
        ("1.5M", 1_500_000),
        ("400k", 400_000),
        ("2B", 2_000_000_000),
        (98304, 98304),
        ("98304", 98304),
        ("1e6", 1_000_000),
        (1e6, 1_000_000),
        ("0.1M", 100_000),
    ],
)
def test_token_counts_read_as_people_write_them(given: Any, count: int) -> None:
    assert study(evaluate={"tokens": given}).evaluate.tokens == count


@pytest.mark.parametrize("given", ["5X", "1.5", 0, -5, "-5M", True, "", 98304.5, float("inf"), "M", [5]])
def test_what_is_no_token_count_is_refused(given: Any) -> None:
    (line,) = problems(evaluate={"tokens": given})
    assert line.startswith("evaluate.tokens: got ")
    assert line.endswith("; expected a whole number of tokens above 0, such as 98304, 400k, 1.5M or 2B")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("site", "layer", True, "site.layer: got true; expected a number"),
        ("site", "layer", 1.5, "site.layer: got 1.5; expected a whole number"),
        ("site", "layer", -1, "site.layer: got -1; expected a number of at least 0"),
        (
            "site",
            "hook",
            "resid",
            'site.hook: got "resid"; expected one of resid_pre, resid_mid, resid_post, attn_out or mlp_out',
        ),
        ("train", "lr", True, "train.lr: got true; expected a number"),
        ("train", "lr", "fast", 'train.lr: got "fast"; expected a number'),
        ("train", "lr", float("nan"), "train.lr: got nan; expected a finite number"),
        ("train", "lr", 0, "train.lr: got 0; expected a number above 0"),
        ("train", "lr", None, "train.lr: got nothing; expected a number"),
        ("train", "lr_decay", 20, "train.lr_decay: got 20; expected a number of at most 1"),
        ("train", "models", [], "train.models: got []; expected at least one entry"),
        ("train", "models", "both", 'train.models: got "both"; expected one of base or chat'),
        ("train", "drop_norm_above", 1, "train.drop_norm_above: got 1; expected a number above 1"),
        ("tokens", "prepend_bos", "off", 'tokens.prepend_bos: got "off"; expected true or false'),
        ("tokens", "prepend_bos", 1, "tokens.prepend_bos: got 1; expected true or false"),
        (
            "tokens",
            "column",
            False,
            "tokens.column: got false; expected text; a number or true/false is text in quotes",
        ),
        ("tokens", "dataset", "", 'tokens.dataset: got ""; expected text that is not empty'),
        ("tokens", "separator", "no", 'tokens.separator: got "no"; expected one of bos, eos or none'),
        ("evaluate", "outliers", [], "evaluate.outliers: got []; expected at least one entry"),
        ("evaluate", "outliers", ["kept", "kept"], 'evaluate.outliers: got ["kept", "kept"]; expected no entry twice'),
        (
            "evaluate",
            "outliers",
            ["kept", "dropped"],
            'evaluate.outliers[1]: got "dropped"; expected one of excluded or kept',
        ),
        (
            "evaluate",
            "outlier_threshold",
            True,
            "evaluate.outlier_threshold: got true; expected a number above 0 (a scaled norm), or auto",
        ),
        (
            "evaluate",
            "outlier_threshold",
            "high",
            'evaluate.outlier_threshold: got "high"; expected a number above 0 (a scaled norm), or auto',
        ),
        ("tracking", "wandb", False, "tracking.wandb: got false; expected one of disabled, offline or online"),
        ("compute", "device", "gpu", 'compute.device: got "gpu"; expected auto, cpu, cuda or cuda:N'),
        (
            "instruct",
            "template",
            "[INST]",
            'instruct.template: got "[INST]"; expected a text in which {instruction} stands once',
        ),
        ("norm_scale", "base", 1.9, "norm_scale.chat: missing; expected: Factor of the chat model at the site."),
        ("evaluate", "tokenz", 5, "evaluate.tokenz: unknown key; did you mean tokens?"),
        ("evaluate", "lr", 5, "evaluate.lr: unknown key; did you mean train.lr?"),
        ("report", "colour", 5, "report.colour: unknown key; expected one of margin"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_what_was_found_and_what_was_expected(
    section: str, key: str, value: Any, message: str
) -> None:
    assert problems(**{section: {**REQUIRED.get(section, {}), key: value}}) == [message]


def test_unknown_keys_of_the_study_itself_are_suggested_too() -> None:
    assert problems(evalute={}, layer=3) == [
        "evalute: unknown key; did you mean evaluate?",
        "layer: unknown key; did you mean site.layer?",
    ]
    assert problems(train=[1]) == ["train: got [1]; expected a mapping of keys to values"]


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "", ".hidden", "-x", "a\nb", " a", "a ", "x" * 101])
def test_names_that_are_no_plain_directory_are_refused(name: str) -> None:
    (line,) = problems(name=name)
    assert line.startswith("name: got ")
    assert "expected a plain directory name" in line
    (line,) = problems(external_saes={"name": name, "trained_on": "base", "path": "x"})
    assert line.startswith("external_saes.name: got ")


def test_saes_expand_to_every_combination() -> None:
    made = study(
        saes=[
            {"widths": [1024, 2048], "l1_coefficient": [3, 0.5], "seeds": [0, 1]},
            {"architecture": "topk", "widths": 1024, "k": 32},
            {"architecture": "jumprelu", "widths": [1024], "l0_coefficient": [1]},
        ]
    ).sae_specs()
    assert len(made) == 10
    assert [spec.name for spec in made[:3]] == [
        "standard-w1024-l1_3-s0",
        "standard-w1024-l1_3-s1",
        "standard-w1024-l1_0.5-s0",
    ]
    assert [spec.name for spec in made[8:]] == ["topk-w1024-k32-s0", "jumprelu-w1024-l0_1-s0"]
    assert made[8] == SAESpec("topk", 1024, "k", 32, 0, {"apply_b_dec_to_input": False})
    assert isinstance(made[8].sparsity_value, int)
    assert made[9].options == {
        "apply_b_dec_to_input": False,
        "jumprelu_init_threshold": 0.01,
        "jumprelu_bandwidth": 0.05,
    }


def test_an_empty_sae_mapping_is_the_posts() -> None:
    assert [spec.name for spec in study(saes={}).sae_specs()] == ["standard-w32768-l1_3-s0"]
    assert [spec.name for spec in study(saes={"architecture": "gated"}).sae_specs()] == ["gated-w32768-l1_3-s0"]


@pytest.mark.parametrize(
    ("saes", "messages"),
    [
        ({"k": [3]}, ["saes.k: belongs to topk and batchtopk; the sparsity key of standard is l1_coefficient"]),
        (
            {"architecture": "topk", "l1_coefficient": 3},
            [
                "saes.l1_coefficient: belongs to standard and gated; the sparsity key of topk is k",
                "saes.k: missing; topk needs it, as in k: [32]",
            ],
        ),
        (
            [{}, {"architecture": "jumprelu"}],
            ["saes[1].l0_coefficient: missing; jumprelu needs it, as in l0_coefficient: [1]"],
        ),
        (
            {"jumprelu_bandwidth": 0.1},
            ["saes.jumprelu_bandwidth: belongs to jumprelu; the sparsity key of standard is l1_coefficient"],
        ),
        (
            {"architecture": "topk", "k": [8, 64], "widths": [32, 128]},
            ["saes.k: 64 active features do not fit in a width of 32"],
        ),
        ({"architecture": "topk", "k": 8.5}, ["saes.k: topk needs whole numbers"]),
        (
            {"architecture": "relu"},
            ['saes.architecture: got "relu"; expected one of standard, gated, topk, batchtopk or jumprelu'],
        ),
        (
            {"architecture": ["topk"]},
            ['saes.architecture: got ["topk"]; expected one of standard, gated, topk, batchtopk or jumprelu'],
        ),
        ({"widths": [1024, 1024]}, ["saes.widths: got [1024, 1024]; expected no entry twice"]),
        (
            [{"widths": [8, 16]}, {"widths": 16, "apply_b_dec_to_input": True}],
            [
                "saes[0]: standard-w16-l1_3-s0: made by more than one entry of saes; entries that differ in other keys"
                " than architecture, width, sparsity and seed belong in studies of their own"
            ],
        ),
        ([], ["saes: got []; expected at least one entry"]),
        ([3], ["saes[0]: got 3; expected a mapping of keys to values"]),
        (3, ["saes: got 3; expected a mapping of keys to values"]),
    ],
)
def test_saes_that_cannot_be_are_refused(saes: Any, messages: list[str]) -> None:
    assert problems(saes=saes) == messages


def test_batchtopk_takes_a_fractional_k() -> None:
    assert study(saes={"architecture": "batchtopk", "k": 8.5}).sae_specs()[0].name == "batchtopk-w32768-k8.5-s0"


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        (
            {"evaluate": {"tokens": 100}},
            ["evaluate.tokens: 100 is less than one sequence (tokens.context_size is 2048)"],
        ),
        (
            {"saes": {}, "train": {"tokens": 1000, "scale_tokens": 2000}},
            [
                "train.batch_size: 4096 is more than all of train.tokens (1000)",
                "train.tokens: 1000 is less than one sequence (tokens.context_size is 2048)",
                "train.scale_tokens: 2000 is less than one sequence (tokens.context_size is 2048)",
            ],
        ),
        (
            {"finetune": {}},
            [
                "finetune: continues SAEs of the base model, and none is trained;"
                " expected saes, and base in train.models"
            ],
        ),
        (
            {"finetune": {}, "saes": {}, "train": {"models": "chat"}},
            [
                "finetune: continues SAEs of the base model, and none is trained;"
                " expected saes, and base in train.models"
            ],
        ),
        (
            {"finetune": {"data": "rollouts"}, "saes": {}},
            ["finetune.data: rollouts are made by the section instruct, which is absent"],
        ),
        (
            {"finetune": {"tokens": ["1M", 200]}, "saes": {}},
            ["finetune.batch_size: 256 is more than all of finetune.tokens (200)"],
        ),
        (
            {"finetune": {"lr_warmup": 0.9}, "saes": {}},
            [
                "finetune.lr_warmup: warm-up (0.9) and decay (0.2) together exceed all steps;"
                " expected a sum of at most 1"
            ],
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(sections: dict[str, Any], messages: list[str]) -> None:
    assert problems(**sections) == messages


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"release": "r"}, "says not where the SAE is; expected path, or release and id"),
        ({"id": "i"}, "says not where the SAE is; expected path, or release and id"),
        ({}, "says not where the SAE is; expected path, or release and id"),
    ],
)
def test_an_external_sae_must_say_where_it_is(entry: dict[str, str], message: str) -> None:
    assert problems(external_saes=[{"name": "x", "trained_on": "base", **entry}]) == [f"external_saes[0]: {message}"]


def test_external_saes_are_refused_when_ambiguous() -> None:
    both = {"name": "x", "trained_on": "base", "path": "p", "release": "r", "id": "i"}
    assert problems(external_saes=both) == [
        "external_saes.path: given together with release or id; expected one of the two ways"
    ]
    one = {"name": "x", "trained_on": "base", "path": "p"}
    assert problems(external_saes=[one, one]) == ["external_saes[0].name: x is the name of several external SAEs"]
    clash = {**one, "name": "finetuned-standard-w32768-l1_3-s0-5M"}
    assert problems(saes={}, external_saes=[clash]) == [
        "external_saes[0].name: finetuned-standard-w32768-l1_3-s0-5M is the id of an SAE trained here"
    ]
    assert study(external_saes=[clash]).external_saes[0].accept_mismatch is False
    assert problems(external_saes={**one, "scale": 0}) == ["external_saes.scale: got 0; expected a number above 0"]


def test_every_problem_is_told_at_once_contradictions_too() -> None:
    told = problems(
        pair={"base": "a", "chat": 5},
        site={"layer": -1},
        saes=[{"widths": [1024, "x"], "k": 3}, 7],
        train={"lr": "fast"},
        finetune={"lr_warmup": 0.9},
        evaluate={"tokenz": 5, "tokens": 100},
        external_saes=[{"name": "../x", "trained_on": "base", "path": "p"}],
    )
    assert [line.split(": ")[0] for line in told] == [
        "pair.chat",
        "site.layer",
        "site.hook",
        "saes[0].widths[1]",
        "saes[1]",
        "train.lr",
        "evaluate.tokenz",
        "external_saes[0].name",
        "evaluate.tokens",
        "finetune.lr_warmup",
    ]
    told = problems(site={"layer": -1}, saes={"widths": [1024, "x"], "k": 3}, evaluate={"outliers": []})
    assert told[-1].startswith("saes.k: belongs to topk and batchtopk")


def test_a_contradiction_with_a_value_that_is_itself_wrong_is_not_told() -> None:
    (line,) = problems(evaluate={"tokens": "100X"}, tokens={"dataset": "x", "context_size": 200_000})
    assert line.startswith('evaluate.tokens: got "100X"')
    (line,) = problems(finetune={}, saes=[3])
    assert line.startswith("saes[0]: got 3")


def test_a_faulty_study_can_be_checked_on_whatever_required_key_is_missing() -> None:
    sections = {"norm_scale": {}, "external_saes": [{}], "pair": {}, "site": {}, "tokens": {}}
    told = problems(**sections, evaluate={"tokens": 100})
    assert [line.split(";")[0] for line in told] == [
        "pair.base: missing",
        "pair.chat: missing",
        "site.layer: missing",
        "site.hook: missing",
        "tokens.dataset: missing",
        "norm_scale.base: missing",
        "norm_scale.chat: missing",
        "external_saes[0].name: missing",
        "external_saes[0].trained_on: missing",
        "evaluate.tokens: 100 is less than one sequence (tokens.context_size is 2048)",
        "external_saes[0]: says not where the SAE is",
    ]


def test_a_study_without_any_sae_is_refused_only_where_one_is_needed() -> None:
    with pytest.raises(StudyError, match="neither saes nor external_saes"):
        require_saes(study())
    require_saes(study(saes={}))
    require_saes(study(external_saes={"name": "x", "trained_on": "base", "path": "p"}))


def test_training_tokens_cover_the_longest_use() -> None:
    assert study().n_training_tokens == 0
    assert study(saes={}).n_training_tokens == 400_000_000
    assert study(saes={}, train={"tokens": "1M"}).n_training_tokens == 1_000_000
    assert study(saes={}, finetune={"tokens": ["1M", "500M"]}).n_training_tokens == 500_000_000


FULL: dict[str, Any] = {
    "saes": {"widths": [1024]},
    "instruct": {},
    "external_saes": [{"name": "x", "trained_on": "base", "path": "p"}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"tracking": {"wandb": "offline"}},
        {"compute": {"device": "cpu"}},
        {"report": {"margin": 0.1}},
        {"pair": {"base": "/models/base", "chat": "elsewhere", "base_revision": "abc"}},
        {"tokens": {"dataset": "/text", "revision": "abc"}},
        {"instruct": {"dataset": "x.json", "rollouts": "y.jsonl"}},
        {"external_saes": [{"name": "x", "trained_on": "base", "path": "/p", "accept_mismatch": True}]},
    ],
)
def test_the_hash_leaves_out_what_changes_no_number(change: dict[str, Any]) -> None:
    assert study_hash(study(**{**FULL, **change}), {}) == study_hash(study(**FULL), {})


@pytest.mark.parametrize(
    "change",
    [
        {"evaluate": {"tokens": 8192}},
        {"pair": {"base": "org/base", "chat": "org/chat", "dtype": "float32"}},
        {"site": {"layer": 12, "hook": "resid_pre"}},
        {"saes": {"widths": [1024], "seeds": [1]}},
        {"instruct": {"template": "{instruction}"}},
        {"external_saes": []},
    ],
)
def test_the_hash_covers_what_changes_numbers(change: dict[str, Any]) -> None:
    assert study_hash(study(**{**FULL, **change}), {}) != study_hash(study(**FULL), {})
    assert study_hash(study(**FULL), {"base": "1"}) != study_hash(study(**FULL), {"base": "2"})


def test_the_hash_depends_neither_on_spelling_nor_order_nor_process() -> None:
    here = study_hash(study(evaluate={"tokens": "98304", "outlier_threshold": 50}), {"a": "1", "b": "2"})
    assert here == study_hash(study(evaluate={"outlier_threshold": 50.0, "tokens": 98304}), {"b": "2", "a": "1"})
    code = (
        "from sae_transfer.study_file import parse_study; from sae_transfer.config import study_hash;"
        f"study = parse_study({{**{REQUIRED!r}, 'evaluate': {{'outlier_threshold': 50}}}}, 'x');"
        "print(study_hash(study, {'b': '2', 'a': '1'}))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_number_fields_are_json() -> None:
    fields = number_fields(study(**FULL))
    assert json.loads(json.dumps(fields)) == fields
    assert fields["pair"] == {"dtype": "auto"}
    assert fields["site"] == {"layer": 13, "hook": "resid_pre"}


def test_studies_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        study().name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_json_schema_describes_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["pair", "site", "tokens"]
    for section in (schema, *schema["$defs"].values()):
        for key, value in section["properties"].items():
            # A section's key may have the section's own description.
            described = schema["$defs"][value["$ref"].split("/")[-1]] if set(value) == {"$ref", "default"} else value
            assert described["description"].endswith("."), key
    counts = schema["$defs"]["Train"]["properties"]["tokens"]
    assert counts["type"] == ["integer", "string"]
    assert counts["default"] == 400_000_000


def test_every_section_is_frozen_and_refuses_unknown_keys() -> None:
    def below(model: type[BaseModel]) -> list[type[BaseModel]]:
        return [model, *(deep for sub in model.__subclasses__() for deep in below(sub))]

    sections = below(Study.__base__)[1:]  # pyright: ignore[reportArgumentType]
    assert len(sections) == 14
    for section in sections:
        assert section.model_config.get("extra") == "forbid"
        assert section.model_config.get("frozen")


def test_the_schema_is_read_without_torch_pandas_or_numpy() -> None:
    code = (
        "import sys, sae_transfer.config, sae_transfer.study_file, sae_transfer.cost;"
        "print({'torch', 'pandas', 'numpy', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
