"""The command line as a user meets it."""

import json
import signal
from pathlib import Path

import pytest

from sae_transfer import __version__
from tests.studies import Started, cli, write_study


def test_help_lists_the_verbs_and_each_verb_has_an_example() -> None:
    listing = cli("--help")
    assert listing.returncode == 0
    for verb in ("demo", "check", "run", "train", "cross-eval", "report", "schema"):
        assert verb in listing.stdout
        assert f"Example: sae-transfer {verb}" in cli(verb, "--help").stdout
    assert cli("--version").stdout.strip() == __version__


def test_mistakes_in_a_study_exit_2_all_at_once_without_traceback(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "pair: {base: demo:base, chat: demo:chat}\nsite: {layer: 2, hook: resid_pree}\n"
        "tokens: {dataset: demo:text, context_sise: 128}\n"
    )
    for verb in ("check", "run", "train", "cross-eval", "report"):
        result = cli(verb, path)
        assert result.returncode == 2, verb
        assert "context_sise" in result.stderr and "context_size" in result.stderr and "site.hook" in result.stderr
        assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wrong.yaml"]


def test_check_says_what_will_be_done_and_what_it_costs(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    config = write_study(tmp_path, *llama_pair, text_file, compute=None)
    result = cli("check", config, "--on", "h200")
    assert result.returncode == 0, result.stderr
    assert "device      h200: 791 TFLOP/s" in result.stdout and "DOES NOT FIT" not in result.stdout
    small = cli("check", config, "--device-spec", "tflops=0.1,gbps=20,gib=0.5")
    assert small.returncode == 0 and "would fit: a GPU of 15 GiB (t4)" in small.stdout
    for word in ("LlamaForCausalLM", "blocks.1.hook_resid_pre", "standard-w64-l1_1-s0", "memory", "FLOPs", "hours"):
        assert word in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.yaml"]


def test_run_prints_the_posts_table_and_where_it_is(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    config = write_study(tmp_path, *llama_pair, text_file)
    result = cli("run", config, "--set", "train.tokens=512", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for heading in ("SAE", "Model", "L0", "CE Loss rec %", "Clean CE Loss", "Explained Variance %", "MSE"):
        assert heading in result.stdout
    assert "…" not in result.stdout, "a number that is cut short is another number"
    assert result.stdout.strip().endswith("results/small/report/index.html")
    again = cli("cross-eval", config, "--set", "train.tokens=512", cwd=tmp_path)
    assert again.returncode == 0 and "cross-eval: done already, nothing to do" in again.stderr
    changed = cli("train", config, "--set", "train.tokens=1024", cwd=tmp_path)
    assert changed.returncode == 2 and "--force" in changed.stderr


def test_a_report_asked_for_too_early_says_which_verb_makes_its_input(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    result = cli("report", write_study(tmp_path, *llama_pair, text_file), "--out", tmp_path / "run")
    assert result.returncode == 2 and "sae-transfer cross-eval" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_schema_is_json_with_every_section() -> None:
    schema = json.loads(cli("schema").stdout)
    assert {"pair", "site", "tokens", "saes", "train", "evaluate"} <= set(schema["properties"])


@pytest.mark.parametrize("arguments", [("run",), ("no-such-verb",), ("run", "absent.yaml")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert cli(*arguments).returncode == 2


def test_ctrl_c_exits_130_and_the_same_command_goes_on(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    config = write_study(tmp_path, *llama_pair, text_file)
    arguments = ["train", str(config), "--out", str(tmp_path / "run"), "--set", "train.batch_size=2"]
    training = Started(*arguments)
    training.wait_for(lambda: training.says("train base:"))
    training.send_signal(signal.SIGINT)
    ended = training.end()
    assert ended.returncode == 130, ended.stderr
    assert "interrupted; finished stages are kept" in ended.stderr and "Traceback" not in ended.stderr
    again = cli(*arguments)
    assert again.returncode == 0 and "base-standard-w64-l1_1-s0: going on from the checkpoint of step" in again.stderr


def test_weight_differences_of_several_studies_stand_in_one_figure(
    llama_pair: tuple[Path, Path], text_file: Path, tmp_path: Path
) -> None:
    config = write_study(tmp_path, *llama_pair, text_file, saes=None, train=None)
    for name in ("one", "other"):
        assert cli("weights", config, "--out", tmp_path / name).returncode == 0
    result = cli("report", config, "--out", tmp_path / "one", "--beside", tmp_path / "other")
    assert result.returncode == 0, result.stderr
    for kind in ("png", "svg"):
        assert (tmp_path / "one" / "report" / "figures" / f"weights_of_several.{kind}").stat().st_size > 1000
    missing = cli("report", config, "--out", tmp_path / "one", "--beside", tmp_path / "absent")
    assert missing.returncode == 2 and "weights" in missing.stderr
