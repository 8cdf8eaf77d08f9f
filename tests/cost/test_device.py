import pytest

from sae_transfer.cost.device import GPUS, choose_device, find_device, parse_device
from sae_transfer.errors import StudyError


def test_a_data_sheet_is_taken_for_what_large_products_and_copies_reach_of_it() -> None:
    # 790 TFLOP/s and 4.3 TB/s were measured on an H200.
    h200 = find_device("H200")
    assert (h200.tflops, h200.gbps) == (pytest.approx(790, rel=0.01), pytest.approx(4300, rel=0.01))


def test_every_gpu_is_found_by_its_name_and_its_figures_are_in_order() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert find_device(gpu.name) == gpu
        assert gpu.tflops >= gpu.tflops_float32 and 14 < gpu.gib < 141


def test_figures_of_another_device_are_taken_as_they_are() -> None:
    mine = parse_device("tflops=100, tflops_float32=20,gbps=900,gib=32")
    assert (mine.tflops, mine.tflops_float32, mine.gbps, mine.gib) == (100, 20, 900, 32)
    assert parse_device("tflops=150,gbps=900,gib=32").tflops_float32 == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tflops=100", "gbps and gib missing"),
        ("tflops=fast,gbps=1,gib=1", "got 'tflops=fast'; expected KEY=NUMBER"),
        ("tflops=0,gbps=1,gib=1", "numbers above 0"),
        ("tflops=1,gbps=1,gib=1,watts=300", "got 'watts=300'; expected tflops"),
    ],
)
def test_wrong_figures_are_refused(spec: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        parse_device(spec)


def test_the_device_is_the_one_named_and_by_default_what_the_study_asks_for() -> None:
    assert choose_device("cpu", None, asked="auto")[1] is False
    assert choose_device(None, None, asked="cpu")[0].name == "cpu"
    assert choose_device(None, None, asked="auto") == (find_device("h100"), True)
    assert choose_device(None, "tflops=1,gbps=1,gib=1", asked="cpu")[1] is False
    with pytest.raises(StudyError, match="got h9000; known are h200"):
        choose_device("h9000", None, asked="auto")
    with pytest.raises(StudyError, match="both"):
        choose_device("h200", "tflops=1,gbps=1,gib=1", asked="auto")
