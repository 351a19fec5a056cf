"""CUDA_VISIBLE_DEVICES, against the documentation of CUDA and against PyTorch."""

from __future__ import annotations

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lora_cache.memory import Gpu, MigPart, visible_devices

UUIDS = ("GPU-8932f937", "GPU-8aa00000", "GPU-c0ffee00", "GPU-c0ffee11")
FOUR = tuple(Gpu(index, uuid, "H100") for index, uuid in enumerate(UUIDS))

MIG = (
    Gpu(0, "GPU-aaaa", "H100"),
    Gpu(1, "GPU-bbbb", "H100", (MigPart(0, "MIG-1111", 1, 0), MigPart(3, "MIG-1122", 2, 0))),
    Gpu(2, "GPU-cccc", "H100", ()),
)


def numbers(value: str | None, gpus: tuple[Gpu, ...] = FOUR) -> list[int]:
    places = visible_devices(gpus, value).places
    assert all(part is None for _, part in places)
    return [gpu.index for gpu, _ in places]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("  ", []),
        ("2,1", [2, 1]),
        (" 0 , 3 ", [0, 3]),
        ("0,2,-1,1", [0, 2]),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,7,1", [0]),
        ("0,x,1", [0]),
        ("1gpu2,2ampere", [1, 2]),
        ("+1", [1]),
        ("1,1", []),
        ("0,GPU-8932f937", [0]),
        ("GPU-8932f937", [0]),
        ("GPU-89,GPU-c0ffee11", [0, 3]),
        ("GPU-c0ffee", []),  # two of them
        ("GPU-89,GPU-c0ffee,GPU-8a", [0]),
        ("GPU-89,0", [0]),
        ("GPU-89,GPU-893", []),  # the same one twice
        ("GPU-nothing", []),
        ("MIG-nothing", []),
        ("gpu-8932f937", []),
    ],
)
def test_which_gpus(value: str | None, expected: list[int]) -> None:
    assert numbers(value) == expected


def test_what_names_nothing_is_said() -> None:
    assert visible_devices(FOUR, "0,1").note is None
    assert visible_devices(FOUR, "").note is None
    for value, word in (("0,9,1", "'9'"), ("GPU-89,GPU-x", "'GPU-x'"), ("GPU-89,1", "'1'")):
        note = visible_devices(FOUR, value).note
        assert note is not None
        assert word in note
        assert value in note
    assert "twice" in (visible_devices(FOUR, "1,1").note or "")


@given(value=st.text(alphabet="0123-+ ,GPUx89acf", max_size=14))
@settings(max_examples=300, deadline=None)
def test_as_pytorch_reads_it(value: str) -> None:
    cuda = pytest.importorskip("torch.cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", value)
        try:
            parsed = cuda._parse_visible_devices()
        except ValueError:  # it stumbles over a lone sign
            reject()
    if parsed and isinstance(parsed[0], str):
        expected = cuda._transform_uuid_to_ordinals(parsed, list(UUIDS))
    else:
        expected = []
        for number in parsed:  # as torch.cuda._device_count_nvml counts them
            if number >= len(FOUR):
                break
            expected.append(number)
    assert numbers(value) == expected


@given(
    st.lists(st.sampled_from([*UUIDS, "GPU-8", "GPU-c0ffee", "GPU-89", "0", "MIG-1"]), max_size=4)
)
@settings(deadline=None)
def test_uuids_as_pytorch_reads_them(entries: list[str]) -> None:
    cuda = pytest.importorskip("torch.cuda")
    value = ",".join(["GPU-8aa", *entries])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", value)
        parsed = cuda._parse_visible_devices()
    assert numbers(value) == cuda._transform_uuid_to_ordinals(parsed, list(UUIDS))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["MIG-1111"]),  # one MIG device hides every whole GPU
        ("0", ["GPU-aaaa"]),
        ("0,1", ["MIG-1111"]),
        ("1", ["MIG-1111"]),
        ("2", []),  # MIG is on, and nothing was made of it
        ("0,2", ["GPU-aaaa"]),
        ("MIG-1122", ["MIG-1122"]),
        ("MIG-1122,MIG-1111", ["MIG-1122"]),  # a process has one at a time
        ("MIG-11", []),
        ("MIG-GPU-bbbb/2/0", ["MIG-1122"]),
        ("MIG-GPU-bbbb/9/0", []),
        ("GPU-bbbb", ["MIG-1111"]),
        ("GPU-aaaa", ["GPU-aaaa"]),
    ],
)
def test_mig(value: str | None, expected: list[str]) -> None:
    places = visible_devices(MIG, value).places
    assert [part.uuid if part else gpu.uuid for gpu, part in places] == expected


def test_gpus_of_several_kinds_are_ordered_by_cuda_alone() -> None:
    mixed = (Gpu(0, "GPU-a", "T4"), Gpu(1, "GPU-b", "H100"))
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in (visible_devices(mixed, None).note or "")
    assert "PCI_BUS_ID" in (visible_devices(mixed, "0", "FASTEST_FIRST").note or "")
    assert visible_devices(mixed, "0", "PCI_BUS_ID").note is None
    assert visible_devices(mixed, "GPU-b").note is None
    assert visible_devices(FOUR, None).note is None
    lost = (*FOUR[:2], Gpu(2, "", ""))
    assert visible_devices(lost, None).note is None
