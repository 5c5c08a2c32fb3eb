"""What is saved beside every measurement."""

import platform

import pytest

from training.costs.environment import describe_environment, environment, processor


XEON = "processor\t: {}\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu {} ht\nbogomips\t: 4599.99\n\n"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("avx2", " (avx2)"),
        ("avx512_bf16 avx avx2 avx512f avx512bw", " (avx2, avx512f, avx512_bf16)"),
        ("amx_tile amx_bf16 avx512f avx2 avx512_bf16", " (avx2, avx512f, avx512_bf16, amx_bf16)"),
        ("sse2", ""),
    ],
)
def test_a_processor_has_its_name_and_instruction_sets(flags, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(XEON.format(0, flags) + XEON.format(1, flags))
    assert processor(tmp_path / "cpuinfo") == f"Intel(R) Xeon(R) Processor{expected}"


@pytest.mark.parametrize("content", [None, "processor\t: 0\nFeatures\t: fp asimd bf16\n"])
def test_a_processor_that_linux_does_not_name(content, tmp_path, monkeypatch):
    """Another system, and ARM."""
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    for known in ("arm", ""):
        monkeypatch.setattr(platform, "processor", lambda known=known: known)
        assert processor(tmp_path / "cpuinfo") == (known or platform.machine())


def test_the_environment_names_the_processor():
    found = environment()
    assert found["processor"] == processor() != ""
    assert f"processor {processor()}" in describe_environment(found)
